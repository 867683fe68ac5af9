"""The dGRPO loss through the heads: 1, 2 and 4 shards, both modes, against dense autograd of its definition."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from heads_reference import dense, student_shard, teacher_shard

from megatron_dgrpo.algorithms.losses import Loss, attach
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import ClippedSurrogate, entropy, reverse_kl
from megatron_dgrpo.heads import row_statistics, row_statistics_with_gradients
from megatron_dgrpo.testing import run_distributed

ROWS, VOCABULARY, TEMPERATURE, LOW, HIGH = 80, 103, 0.7, 0.2, 0.28
FACTORS = {"surrogate": 1.0, "teacher_kl": 0.5, "entropy": 0.01}


def problem():
    generator = torch.Generator().manual_seed(5)
    random = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    hidden_TH, weight_VH = random(ROWS, 16) / 2, random(VOCABULARY, 16) / 2
    teacher_TH, teacher_VH = random(ROWS, 24) / 2, random(VOCABULARY, 24) / 2
    targets_T = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    logprob_T = dense(hidden_TH, weight_VH, targets_T, TEMPERATURE)["logprob"]
    old_T = logprob_T + torch.tensor([-0.5, -0.1, 0.1, 0.5], dtype=torch.float64).repeat(ROWS // 4)
    advantages_T = torch.tensor([1.3, -0.8], dtype=torch.float64).repeat_interleave(ROWS // 2)
    weights_T = torch.rand(ROWS, dtype=torch.float64, generator=generator) / ROWS
    streams = Streams(
        targets_N=targets_T,
        sample_N=torch.zeros(ROWS, dtype=torch.int64),
        position_N=torch.arange(ROWS),
        weights={name: weights_T for name in FACTORS},
        advantages_N=advantages_T,
        old_logprobs_N=old_T,
    )
    return hidden_TH, weight_VH, teacher_TH, teacher_VH, streams


def reference(hidden, weight, teacher_TH, teacher_VH, streams):
    """Eq. 6 of the paper, as it stands there."""
    out = dense(hidden, weight, streams.targets_N, TEMPERATURE, teacher_TH, teacher_VH)
    ratio_T, advantages_T = (out["logprob"] - streams.old_logprobs_N).exp(), streams.advantages_N
    for sign in (advantages_T > 0, advantages_T < 0):
        for beyond in (ratio_T > 1 + HIGH, ratio_T < 1 - LOW):
            assert (sign & beyond).sum() >= ROWS // 10
    surrogate_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - LOW, 1 + HIGH) * advantages_T)
    value_T = -surrogate_T + FACTORS["teacher_kl"] * out["kl"] - FACTORS["entropy"] * out["entropy"]
    return (streams.weights["surrogate"] * value_T).sum()


def one_rank(rank: int, ranks: int, mode: str):
    hidden_TH, weight_VH, teacher_TH, teacher_VH, streams = problem()
    ref_hidden, ref_weight = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    expected = reference(ref_hidden, ref_weight, teacher_TH, teacher_VH, streams)
    expected.backward()

    loss = Loss((ClippedSurrogate(clip_low=LOW, clip_high=HIGH), reverse_kl(), entropy()))
    hidden, head = (
        hidden_TH.clone().requires_grad_(),
        student_shard(weight_VH, rank, 26 if ranks == 4 else 52 * 2 // ranks),
    )
    kwargs = dict(
        temperature=TEMPERATURE,
        group=dist.group.WORLD,
        teacher_hidden_TH=teacher_TH,
        teacher_head=teacher_shard(teacher_VH, head, VOCABULARY, last=False),
        want=loss.statistics,
        chunk_rows=30,
        tile=17,
    )
    if mode == "recompute":
        statistics = row_statistics(hidden, head, streams.targets_N, **kwargs)
        total = attach(loss.evaluate(statistics, streams, FACTORS), statistics)
    else:
        parts = []

        def coefficients(part, rows):
            index = torch.arange(ROWS)[rows]
            parts.append(loss.evaluate(part, streams.select(index), FACTORS))
            return parts[-1].coefficients

        _, carrier = row_statistics_with_gradients(hidden, head, streams.targets_N, coefficients=coefficients, **kwargs)
        total = sum(part.loss for part in parts) + carrier
    total.backward()
    own = head.weight_VH.grad[: head.num_valid]
    return (
        float((total - expected).detach().abs()),
        float((hidden.grad - ref_hidden.grad).abs().max()),
        float((own - ref_weight.grad[head.start : head.start + head.num_valid]).abs().max()),
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mode", ["recompute", "in forward"])
def test_loss_and_gradients(ranks: int, mode: str) -> None:
    for errors in run_distributed(one_rank, ranks, mode):
        assert max(errors) <= 1e-12, errors

"""Corrections of the surrogate: loss and gradient against plain autograd, however the batch is cut."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dgrpo.algorithms.corrections import corrected
from megatron_dgrpo.algorithms.losses import Loss, add_summaries, attach
from megatron_dgrpo.algorithms.metrics import merge, values
from megatron_dgrpo.algorithms.sequence_terms import SequenceSurrogate
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import ClippedSurrogate
from megatron_dgrpo.config.objective import Masked, SequenceMask, Truncated
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.testing.dense import DenseStatistics

LENGTHS_B = [3, 1, 8, 2, 5, 1, 4, 6]
SAMPLE_N = torch.repeat_interleave(torch.arange(8), torch.tensor(LENGTHS_B))
N, V = sum(LENGTHS_B), 9
KINDS = {
    "tis": Truncated(cap=1.5),
    "tis, sequence": Truncated(level="sequence", cap=1.1),
    "icepop": Masked(low=0.6, high=1.6),
    "geometric": SequenceMask(low=0.9, high=1.1),
    "product": SequenceMask(ratio="product", low=0.7, high=1.6),
}


def batch(old: str):
    torch.manual_seed(3)
    logits_NV = torch.randn(N, V, dtype=torch.float64).requires_grad_()
    statistics = DenseStatistics.of(logits_NV, torch.randn(N, V).double(), torch.randint(V, (N,)))
    live_N = statistics.logprob_T.detach()
    stale_N = live_N - 0.3 * torch.randn(N, dtype=torch.float64)
    base_N = live_N if old == "live" else stale_N
    weights_N = torch.rand(N, dtype=torch.float64)
    weights_N[::7] = 0.0  # rows that the surrogate does not act on count in nothing
    lean_B = torch.tensor([0.3, 0.02, -0.2, 0.0, 0.05, -0.6, 0.4, -0.02], dtype=torch.float64)
    streams = Streams(
        targets_N=torch.zeros(N, dtype=torch.long),
        sample_N=SAMPLE_N,
        position_N=torch.arange(N),
        weights={"surrogate": weights_N},
        advantages_N=torch.randn(8, dtype=torch.float64)[SAMPLE_N],
        behaviour_logprobs_N=base_N - lean_B[SAMPLE_N] - 0.3 * torch.randn(N, dtype=torch.float64),
        old_logprobs_N=None if old == "live" else stale_N,
        num_samples=8,
    )
    return logits_NV, statistics, streams, base_N


def reference_weights(by, ratio_N, acting_N):
    """From ratios of probabilities; also which tokens the correction touches."""
    weight_N, touched_N = torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.bool)
    for i in range(8):
        mine_N = (SAMPLE_N == i) & acting_N
        for n in mine_N.nonzero().flatten().tolist():
            own, of_response = ratio_N[n], ratio_N[mine_N].prod()
            match by:
                case Truncated(level="token"):
                    weight_N[n], touched_N[n] = min(own, by.cap), own > by.cap
                case Truncated():
                    weight_N[n], touched_N[n] = min(of_response, by.cap), of_response > by.cap
                case Masked():
                    touched_N[n] = not by.low <= own <= by.high
                    weight_N[n] = 0.0 if touched_N[n] else own
                case SequenceMask():
                    figure = of_response if by.ratio == "product" else of_response ** (1 / int(mine_N.sum()))
                    touched_N[n] = not by.low <= figure <= by.high
                    weight_N[n] = 0.0 if touched_N[n] else 1.0
    return weight_N, touched_N


def splits():
    draw = np.random.default_rng(0)
    yield [np.arange(N)]
    yield [[i] for i in range(N)]
    for parts in (2, 5):
        of_token = draw.integers(0, parts, N)
        yield [[], *(draw.permutation(np.flatnonzero(of_token == part)) for part in range(parts))]


@pytest.mark.parametrize("old", ["live", "stale"])
@pytest.mark.parametrize("by", KINDS.values(), ids=KINDS)
def test_value_and_gradient_are_those_of_autograd_with_constant_weights(by, old):
    logits_NV, statistics, streams, base_N = batch(old)
    acting_N = streams.weights["surrogate"] != 0
    weight_N, touched_N = reference_weights(by, (base_N - streams.behaviour_logprobs_N).exp(), acting_N)
    assert 3 <= int(touched_N.sum()) <= int(acting_N.sum()) - 3
    r_N, a_N = (statistics.logprob_T - base_N).exp(), streams.advantages_N
    surrogate_N = -torch.minimum(r_N * a_N, r_N.clamp(0.8, 1.2) * a_N)
    total = (streams.weights["surrogate"] * weight_N * surrogate_N).sum()
    expected_NV = torch.autograd.grad(total, logits_NV, retain_graph=True)[0]
    loss = Loss((corrected(ClippedSurrogate(), by),))
    for split in splits():
        rows = [torch.as_tensor(part, dtype=torch.long) for part in split]
        parts = [(DenseStatistics(*(x[r] for x in vars(statistics).values())), streams.select(r)) for r in rows]
        summary = add_summaries(loss.summarise(*part) for part in parts)
        evaluations = [loss.evaluate(*part, summary=summary) for part in parts]
        found = sum(attach(e, s) for e, (s, _) in zip(evaluations, parts, strict=True))
        gradient_NV = torch.autograd.grad(found, logits_NV, retain_graph=True)[0]
        assert found.item() == pytest.approx(total.item(), abs=1e-13)
        torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-12, atol=1e-14)
        metrics = values(merge(e.metrics for e in evaluations))
        assert metrics["correction/tokens"] == pytest.approx(touched_N[acting_N].double().mean().item())
        assert metrics["correction/weight"] == pytest.approx(weight_N[acting_N].mean().item())
        if loss.needs == "sequence":
            met = {int(i) for i in SAMPLE_N[acting_N]}
            out = {int(i) for i in SAMPLE_N[acting_N & touched_N]}
            assert metrics["correction/sequences"] == pytest.approx(len(out) / len(met))


def test_only_sequence_corrections_need_a_first_pass():
    needs = {name: Loss((corrected(ClippedSurrogate(), by),)).needs for name, by in KINDS.items()}
    assert needs == dict(zip(KINDS, ["token", "sequence", "token", "sequence", "sequence"], strict=True))


@pytest.mark.parametrize("by", KINDS.values(), ids=KINDS)
def test_equal_log_probs_change_nothing(by):
    logits_NV, statistics, streams, base_N = batch("stale")
    streams = replace(streams, behaviour_logprobs_N=base_N)
    loss = Loss((corrected(ClippedSurrogate(), by),))
    evaluation = loss.evaluate(statistics, streams, summary=loss.summarise(statistics, streams))
    plain = Loss((ClippedSurrogate(),)).evaluate(statistics, streams)
    assert torch.equal(evaluation.coefficients["logprob"], plain.coefficients["logprob"])
    assert values(evaluation.metrics)["correction/tokens"] == 0.0


@pytest.mark.parametrize("by", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_hopeless_log_probs_stay_finite(by, shift):
    _, statistics, streams, base_N = batch("live")
    streams = replace(streams, behaviour_logprobs_N=base_N + shift).to("cpu", torch.float32)
    statistics = DenseStatistics(*(x.detach().float() for x in vars(statistics).values()))
    loss = Loss((corrected(ClippedSurrogate(), by),))
    evaluation = loss.evaluate(statistics, streams, summary=loss.summarise(statistics, streams))
    assert torch.isfinite(evaluation.coefficients["logprob"]).all() and math.isfinite(float(evaluation.loss))


def test_what_cannot_be_corrected_is_refused():
    _, statistics, streams, _ = batch("live")
    term = corrected(ClippedSurrogate(), Masked())
    with pytest.raises(ObjectiveError, match=r"the streams have none.*correction=null"):
        term(statistics, replace(streams, behaviour_logprobs_N=None))
    with pytest.raises(ObjectiveError, match="'surrogate' needs more"):
        corrected(SequenceSurrogate(), Masked())

"""Terms that need more than their own token: over every split of the batch, against their formulas on the whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dgrpo.algorithms.advantages import group_advantages
from megatron_dgrpo.algorithms.aggregation import token_weights
from megatron_dgrpo.algorithms.losses import Loss, add_summaries, attach
from megatron_dgrpo.algorithms.metrics import merge, values
from megatron_dgrpo.algorithms.routing import srpo_routes, srpo_weights
from megatron_dgrpo.algorithms.sequence_terms import EntropyWeighted, SequenceSurrogate
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import ClippedSurrogate, jsd, nll
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.testing.dense import DenseStatistics

V = 9
PROMPT_B = [0, 0, 0, 1, 1, 2, 2, 2]
CORRECT_B = [True, False, False, False, False, True, True, False]
LENGTHS_B = [3, 1, 8, 2, 5, 1, 4, 6]
N = sum(LENGTHS_B)
SAMPLE_N = torch.repeat_interleave(torch.arange(8), torch.tensor(LENGTHS_B))


class World:
    def __init__(self, weights):
        torch.manual_seed(0)
        self.logits_NV = torch.randn(N, V, dtype=torch.float64).requires_grad_()
        self.teacher_NV = 2 * torch.randn(N, V, dtype=torch.float64)
        targets_N = torch.randint(V, (N,))
        self.statistics = DenseStatistics.of(self.logits_NV, self.teacher_NV, targets_N)
        shift_B = torch.tensor([0.5, -0.4, 0.0, 0.3, -0.5, 0.02, 0.6, -0.7], dtype=torch.float64)
        noise_N = 0.1 * torch.randn(N, dtype=torch.float64)
        advantages_B = group_advantages([float(c) for c in CORRECT_B], PROMPT_B, kind="mean").values_N
        advantages_B[3], advantages_B[4] = 0.7, -0.4  # an unsolved group has none; some for the surrogate's tests
        self.streams = Streams(
            targets_N=targets_N, sample_N=SAMPLE_N, position_N=torch.arange(N),
            weights={name: torch.as_tensor(w) for name, w in weights.items()},
            advantages_N=torch.from_numpy(advantages_B)[SAMPLE_N],
            old_logprobs_N=self.statistics.logprob_T.detach() - shift_B[SAMPLE_N] - noise_N,
            num_samples=8,
        )  # fmt: skip

    def part(self, rows):
        return DenseStatistics(*(x[rows] for x in vars(self.statistics).values())), self.streams.select(rows)

    def run(self, loss, micro_batches, factors=None):
        parts = [self.part(torch.as_tensor(rows, dtype=torch.long)) for rows in micro_batches]
        summary = add_summaries(loss.summarise(*part) for part in parts)
        evaluations = [loss.evaluate(*part, factors, summary) for part in parts]
        total = sum(attach(e, s) for e, (s, _) in zip(evaluations, parts, strict=True))
        gradient_NV = torch.autograd.grad(total, self.logits_NV, retain_graph=True)[0]
        return total.item(), gradient_NV, values(merge(e.metrics for e in evaluations))


def splits():
    rng = np.random.default_rng(0)
    yield [np.arange(N)]
    yield [[i] for i in range(N)]
    yield [[], np.arange(N)[::-1].copy(), []]
    for parts in (2, 3, 5):
        of_token = rng.integers(0, parts, N)
        yield [rng.permutation(np.flatnonzero(of_token == part)) for part in range(parts)]


def test_gspo_equals_its_formula_however_the_responses_are_cut():
    world = World({"surrogate": token_weights("sequence_group_prompt_mean", SAMPLE_N.numpy(), PROMPT_B)})
    term = SequenceSurrogate(clip_low=0.2, clip_high=0.25)
    total, clipped = 0.0, []
    for i in range(8):
        of_i = SAMPLE_N == i
        s = (world.statistics.logprob_T - world.streams.old_logprobs_N)[of_i].mean().exp()
        a = world.streams.advantages_N[of_i][0]
        total = total - torch.minimum(s * a, s.clamp(0.8, 1.25) * a) / (3 * PROMPT_B.count(PROMPT_B[i]))
        clipped.append(bool((a > 0) & (s > 1.25) | (a < 0) & (s < 0.8)))
    assert 2 <= sum(clipped) <= 6
    expected_NV = torch.autograd.grad(total, world.logits_NV, retain_graph=True)[0]
    for micro_batches in splits():
        loss, gradient_NV, metrics = world.run(Loss((term,)), micro_batches)
        assert loss == pytest.approx(total.item(), abs=1e-13)
        torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-12, atol=1e-14)
        share = sum(n for n, c in zip(LENGTHS_B, clipped, strict=True) if c) / N
        assert metrics["surrogate/clipped_high"] + metrics["surrogate/clipped_low"] == pytest.approx(share)


def test_gspo_without_old_logprobs_is_the_policy_gradient():
    world = World({"surrogate": token_weights("sequence_mean", SAMPLE_N.numpy(), PROMPT_B)})
    world.streams = replace(world.streams, old_logprobs_N=None)
    _, sequence_NV, _ = world.run(Loss((SequenceSurrogate(),)), [np.arange(N)])
    _, token_NV, _ = world.run(Loss((ClippedSurrogate(),)), [np.arange(N)])
    torch.testing.assert_close(sequence_NV, token_NV, rtol=1e-13, atol=0)


def test_srpo_equals_its_formula_however_the_batch_is_cut():
    distilled_B = srpo_routes(CORRECT_B, PROMPT_B)
    weights = srpo_weights(distilled_B, SAMPLE_N.numpy(), surrogate="surrogate", distillation="teacher_jsd")
    world = World(weights)
    loss = Loss((ClippedSurrogate(clip_low=0.2, clip_high=0.28), EntropyWeighted(term=jsd(), beta=1.5)))
    assert loss.needs == "batch"
    s = world.statistics
    distilled_N = torch.from_numpy(distilled_B)[SAMPLE_N]
    raw_N = torch.exp(-1.5 * s.teacher_entropy_T)
    weight_N = raw_N / raw_N[distilled_N].mean()
    ratio_N = (s.logprob_T - world.streams.old_logprobs_N).exp()
    a_N = world.streams.advantages_N
    surrogate_N = -torch.minimum(ratio_N * a_N, ratio_N.clamp(0.8, 1.28) * a_N)
    total = torch.where(distilled_N, weight_N * s.jsd_T, surrogate_N).sum() / N
    expected_NV = torch.autograd.grad(total, world.logits_NV, retain_graph=True)[0]
    for micro_batches in splits():
        value, gradient_NV, metrics = world.run(loss, micro_batches)
        assert value == pytest.approx(total.item(), abs=1e-13)
        torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-12, atol=1e-14)
        assert metrics["teacher_jsd/entropy_weight"] == pytest.approx(1.0, rel=1e-12)
        assert metrics["teacher_jsd/weight"] == pytest.approx(int(distilled_N.sum()) / N, rel=1e-12)
    assert float((weight_N - 1).abs().max()) > 0.3


def test_entropy_weights_that_all_vanish_are_counted_and_silent():
    world = World({"teacher_jsd": torch.ones(N, dtype=torch.float64)})
    value, gradient_NV, metrics = world.run(Loss((EntropyWeighted(term=jsd(), beta=1e6),)), [np.arange(N)])
    assert value == 0.0 and not gradient_NV.any() and metrics["teacher_jsd/silenced"] == 1
    assert metrics["nonfinite_rows"] == 0
    world = World({"teacher_jsd": torch.zeros(N, dtype=torch.float64)})
    value, _, metrics = world.run(Loss((EntropyWeighted(term=jsd()),)), [np.arange(N)])
    assert value == 0.0 and metrics["teacher_jsd/silenced"] == 0


def test_a_missing_pass_and_impossible_nestings_are_refused():
    world = World({"surrogate": torch.ones(N).double()})
    loss = Loss((SequenceSurrogate(),))
    assert loss.needs == "sequence"
    with pytest.raises(ObjectiveError, match="needs the whole sequence"):
        loss.evaluate(world.statistics, world.streams)
    with pytest.raises(ObjectiveError, match="how many there are"):
        loss.summarise(world.statistics, replace(world.streams, num_samples=None))
    with pytest.raises(ObjectiveError, match="single tokens"):
        EntropyWeighted(term=SequenceSurrogate())
    assert EntropyWeighted(term=nll("mine")).name == "mine"

"""The loss of a batch: its sum of terms, its independence of how the batch is cut, its backward."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
from megatron_dgrpo.algorithms.losses import Loss, attach, nonfinite_report
from megatron_dgrpo.algorithms.metrics import merge, pack, unpack, values
from megatron_dgrpo.algorithms.terms import entropy, nll, reverse_kl
from megatron_dgrpo.config.schema import Objective
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import reference, run_distributed
from megatron_dgrpo.testing.dense import DenseStatistics

V, TEMPERATURE = 11, 0.7
LENGTHS = [(1, 6), (5, 1, 9), (3, 12, 1, 7)]
REWARDS = [(1.0, 1.0), (0.0, 0.3, 1.0), (0.0, 0.1, 0.4, 1.0)]
OBJECTIVE = Objective(clip_low=0.2, clip_high=0.25, beta=0.5)


class World:
    """Bigram models, whose logits are a table's rows, and a ragged batch: groups of 2, 3 and 4, one-token responses, a
    group of equal rewards, stale old log-probs."""

    def __init__(self, old="stale"):
        generator = torch.Generator().manual_seed(3)
        rng = np.random.default_rng(3)
        table = lambda: torch.randn(V, V, dtype=torch.float64, generator=generator)  # noqa: E731
        self.student_VV, self.teacher_VV = table().requires_grad_(), table()
        self.trajectories, self.responses, self.rewards, previous = [], [], [], []
        for prompt, lengths in enumerate(LENGTHS):
            prompt_tokens = rng.integers(0, V, 2 + prompt)
            for sample, length in enumerate(lengths):
                tokens = rng.integers(0, V, length)
                before = np.concatenate([prompt_tokens[-1:], tokens[:-1]])
                l_TV = (self.student_VV.detach()[before] / TEMPERATURE).log_softmax(-1)
                current_T = l_TV[torch.arange(length), tokens].numpy()
                old_T = current_T + 0.8 * rng.permuted(np.arange(length) % 3 - 1) if old == "stale" else None
                reward = REWARDS[prompt][sample]
                self.trajectories.append(
                    Trajectory(f"p{prompt}", sample, prompt_tokens, (Segment(tokens, True, current_T, old_T),), "stop")
                )
                self.responses.append(reference.Response(prompt_tokens, tokens, reward, prompt, old_T))
                self.rewards.append(reward)
                previous.append(before)
        self.previous_N = torch.from_numpy(np.concatenate(previous))
        self.streams = dgrpo_streams(self.trajectories, self.rewards, OBJECTIVE).streams

    def statistics(self, rows_R):
        rows = self.previous_N[rows_R]
        return DenseStatistics.of(
            self.student_VV[rows], self.teacher_VV[rows], self.streams.targets_N[rows_R], temperature=TEMPERATURE
        )

    def micro_batch(self, rows_R):
        loss, factors = dgrpo_loss(OBJECTIVE)
        statistics = self.statistics(rows_R)
        evaluation = loss.evaluate(statistics, self.streams.select(rows_R), factors)
        scalar = attach(evaluation, statistics)
        scalar.backward()
        return scalar.detach(), evaluation.metrics

    def run(self, micro_batches):
        """Loss, gradient and metrics of one update over these micro-batches of rows."""
        self.student_VV.grad = torch.zeros_like(self.student_VV)
        results = [self.micro_batch(torch.as_tensor(rows, dtype=torch.long)) for rows in micro_batches]
        loss = sum(float(scalar) for scalar, _ in results)
        return loss, self.student_VV.grad.clone(), values(merge([metrics for _, metrics in results]))

    def expected(self):
        self.student_VV.grad = None
        result = reference.dgrpo(
            self.responses, lambda ids: self.student_VV[ids], lambda ids: self.teacher_VV[ids],
            beta=OBJECTIVE.beta.value, clip_low=OBJECTIVE.clip_low, clip_high=OBJECTIVE.clip_high,
            temperature=TEMPERATURE,
        )  # fmt: skip
        result.loss.backward()
        return result, self.student_VV.grad.clone()


def splits():
    n, rng = World().streams.num_tokens, np.random.default_rng(0)
    sample_N = World().streams.sample_N.numpy()
    yield "whole", [np.arange(n)]
    yield "token by token", [[i] for i in range(n)]
    yield "reversed", [np.arange(n)[::-1].copy()]
    yield "by response", [np.flatnonzero(sample_N == i) for i in rng.permutation(sample_N.max() + 1)]
    for parts in (2, 3, 7):
        for _ in range(4):
            of_sample = rng.integers(0, parts, sample_N.max() + 1)
            yield f"responses over {parts}", [np.flatnonzero(of_sample[sample_N] == part) for part in range(parts)]
            of_token = rng.integers(0, parts, n)
            yield f"tokens over {parts}", [rng.permutation(np.flatnonzero(of_token == part)) for part in range(parts)]
    yield "with empty micro-batches", [[], np.arange(n // 2), [], np.arange(n // 2, n), []]


@pytest.mark.parametrize("old", ["stale", None])
def test_every_split_gives_the_reference_loss_and_gradient(old):
    world = World(old)
    result, gradient_VV = world.expected()
    if old:
        pairs = [(a > 0, r) for a, rs in zip(result.advantages, result.ratios, strict=True) if a for r in rs]
        for up in (True, False):
            assert np.mean([u == up and r > 1 + OBJECTIVE.clip_high for u, r in pairs]) >= 0.1
            assert np.mean([u == up and r < 1 - OBJECTIVE.clip_low for u, r in pairs]) >= 0.1
    whole = None
    for name, micro_batches in splits():
        loss, got_VV, metrics = world.run(micro_batches)
        assert abs(loss - float(result.loss.detach())) <= 1e-12, name
        assert float((got_VV - gradient_VV).abs().max()) <= 1e-12, name
        whole = whole or metrics
        assert metrics == pytest.approx(whole, rel=1e-10, abs=1e-12), name
    assert whole["surrogate/clipped_high"] == pytest.approx(result.clipped_high)
    assert whole["surrogate/clipped_low"] == pytest.approx(result.clipped_low)
    assert whole["surrogate/loss"] == pytest.approx(float(result.surrogate.detach()), rel=1e-12)
    assert whole["teacher_kl/loss"] == pytest.approx(float(result.kl.detach()), rel=1e-12)
    assert whole["loss"] == pytest.approx(float(result.loss.detach()), rel=1e-12)


def test_two_responses_on_either_of_two_ranks_in_every_way():
    """Exhaustively: each response of the batch on one of two ranks."""
    world = World()
    _, gradient_VV = world.expected()
    sample_N = world.streams.sample_N
    samples = int(sample_N.max()) + 1
    for code in range(2 ** (samples - 1)):
        on_one_N = torch.tensor([(code >> i) & 1 for i in range(samples)])[sample_N].bool()
        _, got_VV, _ = world.run([torch.nonzero(on_one_N)[:, 0], torch.nonzero(~on_one_N)[:, 0]])
        assert float((got_VV - gradient_VV).abs().max()) <= 1e-12, code


def one_rank(rank, world_size, assignment):
    """A data-parallel rank: its rows in two micro-batches (the second one empty where it has few)."""
    world = World()
    rows = torch.nonzero(torch.tensor(assignment)[world.streams.sample_N] == rank)[:, 0]
    world.student_VV.grad = torch.zeros_like(world.student_VV)
    results = [world.micro_batch(part) for part in (rows[:9], rows[9:])]
    loss = sum(scalar for scalar, _ in results)
    metrics = merge([m for _, m in results])
    sums, maxima = pack(metrics)
    for tensor, op in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        dist.all_reduce(tensor, op=op)
    dist.all_reduce(world.student_VV.grad)
    dist.all_reduce(loss)
    return float(loss), world.student_VV.grad.numpy(), values(unpack(metrics, sums, maxima))


@pytest.mark.parametrize("assignment", [[0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1, 1, 1, 0], [2] * 9])
def test_data_parallel_ranks_some_of_them_empty(assignment):
    world = World()
    result, gradient_VV = world.expected()
    _, _, whole = world.run([torch.arange(world.streams.num_tokens)])
    for loss, got_VV, metrics in run_distributed(one_rank, 3, assignment):
        assert abs(loss - float(result.loss.detach())) <= 1e-12
        assert np.abs(got_VV - gradient_VV.numpy()).max() <= 1e-12
        assert metrics == pytest.approx(whole, rel=1e-10, abs=1e-12)


def test_terms_of_one_statistic_add_up_and_factors_scale():
    world = World()
    rows = torch.arange(world.streams.num_tokens)
    statistics = world.statistics(rows)
    weights = {
        name: torch.rand(len(rows), dtype=torch.float64) for name in ("nll", "other_nll", "entropy", "teacher_kl")
    }
    streams = replace(world.streams, weights=weights)
    loss = Loss((nll(), nll("other_nll"), entropy(), reverse_kl()))
    factors = {"nll": 0.3, "other_nll": 2.0, "entropy": 0.01, "teacher_kl": 0.0}
    evaluation = loss.evaluate(statistics, streams, factors)
    expected = -((0.3 * weights["nll"] + 2 * weights["other_nll"]) * statistics.logprob_T).sum()
    expected = expected - 0.01 * (weights["entropy"] * statistics.entropy_T).sum()
    assert float(evaluation.loss) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert set(evaluation.coefficients) == {"logprob", "entropy"}
    assert "teacher_kl/loss" in evaluation.metrics
    expected_VV = torch.autograd.grad(expected, world.student_VV, retain_graph=True)[0]
    scaled_VV = torch.autograd.grad(8.0 * attach(evaluation, statistics), world.student_VV)[0]
    torch.testing.assert_close(scaled_VV, 8.0 * expected_VV, rtol=1e-12, atol=1e-14)
    of_one = evaluation.coefficients_of("nll")["logprob"]
    torch.testing.assert_close(of_one, -0.3 * weights["nll"], rtol=1e-14, atol=0)
    assert loss.statistics == {"logprob", "entropy", "kl"} and loss.needs == "token"


def test_attach_keeps_the_value_that_coefficients_do_not_follow():
    """The value is the loss, the backward the coefficients, also where neither is the other's derivative."""
    statistics = World().statistics(torch.arange(3))
    streams = World().streams.select(torch.arange(3))
    loss, factors = dgrpo_loss(OBJECTIVE)
    evaluation = loss.evaluate(statistics, streams, factors)
    scalar = attach(evaluation, statistics)
    assert float(scalar.detach()) == pytest.approx(float(evaluation.loss))
    got = torch.autograd.grad(scalar, [statistics.kl_T, statistics.logprob_T])
    assert torch.equal(got[0], evaluation.coefficients["kl"]) and torch.equal(
        got[1], evaluation.coefficients["logprob"]
    )


def test_non_finite_rows_are_counted_and_reported_by_term_and_row():
    world = World()
    rows = torch.arange(world.streams.num_tokens)
    statistics = world.statistics(rows)
    statistics.kl_T = statistics.kl_T.detach().index_fill(0, torch.tensor([4]), math.nan)
    statistics.logprob_T = statistics.logprob_T.detach().index_fill(0, torch.tensor([7]), -math.inf)
    loss, factors = dgrpo_loss(OBJECTIVE)
    evaluation = loss.evaluate(statistics, world.streams, factors)
    assert values(evaluation.metrics)["nonfinite_rows"] == 2
    report = nonfinite_report(evaluation, statistics, world.streams)
    sample, position = int(world.streams.sample_N[4]), int(world.streams.position_N[4])
    assert any(
        line.startswith(f"term teacher_kl is nan at row 4: sample {sample}, position {position}") for line in report
    )
    assert any("log-prob is -inf at row 7" in line for line in report)


def test_sound_rows_have_no_report():
    world = World()
    statistics = world.statistics(torch.arange(5))
    loss, factors = dgrpo_loss(OBJECTIVE)
    streams = world.streams.select(torch.arange(5))
    assert nonfinite_report(loss.evaluate(statistics, streams, factors), statistics, streams) == []


def test_contradictions_are_refused():
    with pytest.raises(ObjectiveError, match="same name"):
        Loss((nll(), nll()))
    world = World()
    rows = torch.arange(4)
    with pytest.raises(ObjectiveError, match=r"unknown terms \['beta'\]"):
        dgrpo_loss(OBJECTIVE)[0].evaluate(world.statistics(rows), world.streams.select(rows), {"beta": 1.0})

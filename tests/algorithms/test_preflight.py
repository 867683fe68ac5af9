"""Faults are injected into tensors: what reaches the statistics, not what a configuration says."""

import pytest
import torch

from megatron_dgrpo.algorithms.build import dgrpo_loss
from megatron_dgrpo.algorithms.estimators import SampledReverseKL
from megatron_dgrpo.algorithms.losses import Loss
from megatron_dgrpo.algorithms.preflight import Rows, preflight, preflight_path
from megatron_dgrpo.algorithms.sequence_terms import SequenceSurrogate
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import ClippedSurrogate, jsd, reverse_kl
from megatron_dgrpo.config.schema import Objective
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.heads import HeadShard, row_statistics
from megatron_dgrpo.testing.dense import DenseStatistics

T, V, HS, HT, TEMPERATURE = 24, 32, 16, 12, 0.7


class World:
    """Two heads, rows, and the ways in which a trainer can go wrong between them."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        normal = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
        self.student_VH, self.teacher_VH = normal(V, HS) / 2, normal(V, HT) / 2
        targets_T = torch.randint(V, (T,))
        weights = {name: torch.full((T,), 1 / T) for name in ("surrogate", "teacher_kl", "teacher_jsd")}
        streams = Streams(
            targets_N=targets_T, sample_N=torch.arange(T) // 6, position_N=torch.arange(T), weights=weights,
            advantages_N=torch.randn(T), num_samples=4,
        )  # fmt: skip
        self.rows = Rows(streams, normal(T, HS), normal(T, HT))

    def own(self, student_TH, teacher_TH, *, scale=1.0):
        return self._score(student_TH, teacher_TH, self.student_VH, scale)

    def pair(self, student_TH, teacher_TH, *, scale=1.0):
        return self._score(student_TH, teacher_TH, self.teacher_VH, scale)

    def _score(self, student_TH, teacher_TH, teacher_VH, scale):
        logits_TV = student_TH.float() @ self.student_VH.float().T
        teacher_TV = scale * (teacher_TH.float() @ teacher_VH.float().T)
        return DenseStatistics.of(logits_TV, teacher_TV, self.rows.streams.targets_N, temperature=TEMPERATURE)

    def run(self, loss=None, factors=None, own=None, pair=None):
        if loss is None:
            loss, factors = dgrpo_loss(Objective())
        return preflight(
            loss, factors or {}, self.rows, own=own or self.own, pair=pair or self.pair, temperature=TEMPERATURE
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [
        None,
        Loss((ClippedSurrogate(), jsd())),
        Loss((ClippedSurrogate(), SampledReverseKL())),
        Loss((SequenceSurrogate(), reverse_kl())),
    ],
    ids=["dgrpo", "jsd", "sampled", "gspo"],
)
def test_a_sound_objective_passes(dtype, loss):
    report = World(dtype).run(loss)
    assert report.problems == ()
    report.check()
    assert report.measured["identical_kl"] <= 1e-6 and report.measured["identical_adds"] <= 1e-5
    assert report.measured["perturbed_changes"] > 1e-2 and report.measured["other_gradient"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_heads_are_sound_and_a_fault_in_one_is_named(dtype):
    world = World(dtype)
    targets_T = world.rows.streams.targets_N

    def score(teacher_VH, scale=1.0):
        return lambda s, t: row_statistics(
            s, HeadShard(world.student_VH, 0, V), targets_T, temperature=TEMPERATURE, group=None,
            teacher_hidden_TH=t, teacher_head=HeadShard(scale * teacher_VH, 0, V),
        )  # fmt: skip

    report = world.run(own=score(world.student_VH), pair=score(world.teacher_VH))
    assert report.problems == () and report.measured["teacher_gradient"] > 1e-3
    hot = world.run(own=score(world.student_VH, 1 / TEMPERATURE), pair=score(world.teacher_VH))
    assert "temperature 0.7 divides the teacher's logits once more" in hot.problems[0]


@pytest.mark.parametrize("scale, side", [(1 / TEMPERATURE, "teacher's"), (TEMPERATURE, "student's")])
def test_a_temperature_on_one_side_only_is_named(scale, side):
    """`scale` times the teacher's logits: divided once too often, or not at all."""
    world = World()
    report = world.run(own=lambda s, t: world.own(s, t, scale=scale))
    assert f"temperature 0.7 divides the {side} logits once more" in report.problems[0]
    assert report.measured["identical_kl"] > 1e-4
    with pytest.raises(ObjectiveError, match="identical to the student"):
        report.check()


def test_shifted_rows_are_caught():
    world = World()
    report = world.run(own=lambda s, t: world.own(s, t.roll(1, 0)))
    assert "differ in their rows, their vocabulary or their arithmetic" in report.problems[0]


def test_a_swapped_vocabulary_is_caught():
    world = World()
    report = world.run(own=lambda s, t: world._score(s, t, world.student_VH.roll(1, 0), 1.0))
    assert any("identical to the student has a KL" in problem for problem in report.problems)


def stopped(statistics):
    """KL and the like without a gradient; the teacher's figures are all there."""
    for name in ("kl_T", "jsd_T"):
        value_T = getattr(statistics, name).detach()
        setattr(statistics, name, value_T.requires_grad_())
    return statistics


def test_a_stopped_gradient_is_caught():
    world = World()
    report = world.run(pair=lambda s, t: stopped(world.pair(s, t)))
    (problem,) = report.problems
    assert "perturbed teacher changes the gradient of teacher_kl by 0 " in problem and "dropped" in problem


def test_a_teacher_that_is_dropped_on_the_way_is_caught():
    world = World()
    zeros_TH = torch.zeros(T, HT)
    report = world.run(pair=lambda s, t: world.pair(s, zeros_TH))
    assert any("perturbed teacher" in problem for problem in report.problems)


def test_a_gradient_that_ignores_the_teacher_is_caught():
    """d logprob instead of d KL: what differentiating mean(logp - teacher_logp) does."""
    world = World()

    def score(s, t):
        statistics = world.pair(s, t)
        statistics.kl_T = statistics.logprob_T - statistics.teacher_logprob_T
        return statistics

    report = world.run(pair=score)
    assert any("perturbed teacher" in problem for problem in report.problems)


def test_a_teacher_equal_to_the_student_that_still_pulls_is_caught():
    world = World()

    def score(s, t):
        statistics = world.own(s, t)
        statistics.kl_T = statistics.kl_T + (statistics.logprob_T - statistics.logprob_T.detach())
        return statistics

    report = world.run(own=score)
    (problem,) = report.problems
    assert "must leave the other terms' gradient alone" in problem


def test_nan_is_a_problem_not_a_pass():
    world = World()
    report = world.run(own=lambda s, t: world.own(s, t * float("nan")))
    assert any("KL of nan" in problem for problem in report.problems)


def test_a_term_that_is_switched_off_need_not_teach():
    world = World()
    loss, factors = Loss((ClippedSurrogate(), reverse_kl())), {"teacher_kl": 0.0}
    assert world.run(loss, factors, pair=lambda s, t: stopped(world.pair(s, t))).problems == ()


@pytest.mark.parametrize("dtype, noise", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_path_of_a_teacher_with_the_students_weights(dtype, noise):
    """Rounding passes; a temperature of one side and a row off by one do not."""
    world = World(dtype)
    hidden_TH = world.rows.hidden_TH
    near_TH = (hidden_TH.double() * (1 + noise * torch.randn(T, HS))).to(dtype)
    score = lambda s, t: world._score(s, t, world.student_VH, 1.0)  # noqa: E731
    check = lambda t_TH: preflight_path(  # noqa: E731
        Rows(world.rows.streams, hidden_TH, t_TH), pair=score, temperature=TEMPERATURE
    )
    sound = check(near_TH)
    assert sound.problems == () and sound.measured["path_kl"] >= 0
    (hot,) = check((near_TH.double() / TEMPERATURE).to(dtype)).problems
    assert "divides the teacher's logits once more" in hot
    (off,) = check(near_TH.roll(1, 0)).problems
    assert "its own path" in off and "rows" in off

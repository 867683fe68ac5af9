"""Sampled estimators, by full enumeration: every token of a small vocabulary, weighted by its probability under the
sampler, so that a sum over rows *is* the expectation and nothing here is Monte Carlo."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_dgrpo.algorithms.estimators import K2ReverseKL, K3ForwardKL, SampledReverseKL, teacher_divergence
from megatron_dgrpo.algorithms.losses import Loss, attach
from megatron_dgrpo.algorithms.metrics import values
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.config.divergences import ESTIMATORS
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.testing.dense import DenseStatistics

C, V, TEMPERATURE = 5, 7, 0.7


class Enumeration:
    """All V tokens after each of C contexts; row (c, v) has weight mu(v | c)."""

    def __init__(self, stale, lacking=0):
        torch.manual_seed(0)
        self.logits_CV = torch.randn(C, V, dtype=torch.float64).requires_grad_()
        self.teacher_CV = torch.randn(C, V - lacking, dtype=torch.float64)
        drift_CV = torch.randn(C, V, dtype=torch.float64) if stale else torch.zeros(C, V, dtype=torch.float64)
        mu_CV = torch.log_softmax((self.logits_CV.detach() + drift_CV) / TEMPERATURE, -1)
        targets_T = torch.arange(V).repeat(C)
        rows_T = torch.arange(C).repeat_interleave(V)
        self.statistics = DenseStatistics.of(
            self.logits_CV[rows_T], self.teacher_CV[rows_T], targets_T, temperature=TEMPERATURE
        )
        weights = {"teacher_kl": mu_CV.exp().flatten(), "teacher_forward_kl": mu_CV.exp().flatten()}
        self.streams = Streams(
            targets_N=targets_T, sample_N=rows_T, position_N=rows_T, weights=weights,
            old_logprobs_N=mu_CV.flatten() if stale else None,
            behaviour_logprobs_N=mu_CV.flatten() + 0.3 * torch.randn(C * V, dtype=torch.float64),
        )  # fmt: skip

    def expected(self, term):
        """E_mu of the term's value and of its gradient by the logits."""
        evaluation = Loss((term,)).evaluate(self.statistics, self.streams)
        scalar = attach(evaluation, self.statistics)
        return float(evaluation.loss), torch.autograd.grad(scalar, self.logits_CV, retain_graph=True)[0], evaluation

    def exact(self, direction):
        l_CV = torch.log_softmax(self.logits_CV[:, : self.teacher_CV.shape[1]] / TEMPERATURE, -1)
        r_CV = torch.log_softmax(self.teacher_CV / TEMPERATURE, -1)
        pairs = {"reverse": (l_CV.exp() * (l_CV - r_CV)), "forward": (r_CV.exp() * (r_CV - l_CV))}
        kl = pairs[direction].sum()
        return float(kl.detach()), torch.autograd.grad(kl, self.logits_CV)[0]


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(
    "term, direction",
    [
        (SampledReverseKL(), "reverse"),
        (SampledReverseKL(baseline=True), "reverse"),
        (K2ReverseKL(), "reverse"),
        (K3ForwardKL(), "forward"),
    ],
    ids=["sampled", "sampled with baseline", "k2", "k3"],
)
def test_expected_gradient_is_the_exact_one(term, direction, stale):
    world = Enumeration(stale)
    value, gradient_CV, _ = world.expected(term)
    exact, exact_CV = world.exact(direction)
    torch.testing.assert_close(gradient_CV, exact_CV, rtol=1e-11, atol=1e-12)
    if isinstance(term, SampledReverseKL | K3ForwardKL):  # k3's value is of the reverse KL, whatever its gradient
        assert value == pytest.approx(world.exact("reverse")[0], rel=1e-12)
    assert float((exact_CV - world.exact("forward" if direction == "reverse" else "reverse")[1]).norm()) > 0.1


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("term, direction", [(SampledReverseKL(baseline=True), "reverse"), (K3ForwardKL(), "forward")])
def test_ids_that_the_teacher_lacks_are_outside_of_the_divergence(term, direction, stale):
    """Exact over the shared ids, with 2 of 7 ids and a third of the mass outside of them."""
    world = Enumeration(stale, lacking=2)
    value, gradient_CV, evaluation = world.expected(term)
    assert float(world.statistics.outside_mass_T.mean()) > 0.1
    torch.testing.assert_close(gradient_CV, world.exact(direction)[1], rtol=1e-11, atol=1e-12)
    assert value == pytest.approx(world.exact("reverse")[0], rel=1e-12)
    metrics = values(evaluation.metrics)
    assert metrics[f"{term.name}/teacher_lacks"] == 2 * C and metrics["nonfinite_rows"] == 0


def test_the_baseline_lowers_the_variance():
    world = Enumeration(stale=False)
    second_moment = {}
    for baseline in (False, True):
        _, _, evaluation = world.expected(SampledReverseKL(baseline=baseline))
        p_T = world.streams.weights["teacher_kl"]
        slope_T = evaluation.coefficients["logprob"] / p_T
        score_norm_T = (1 - 2 * p_T).clamp(min=0) + p_T.reshape(C, V).square().sum(-1).repeat_interleave(V)
        second_moment[baseline] = float((p_T * slope_T.square() * score_norm_T).sum())
    assert second_moment[True] < 0.9 * second_moment[False]


def test_the_ratio_may_be_the_engines():
    world = Enumeration(stale=True)
    behaviour_T = world.streams.behaviour_logprobs_N
    weights = {"teacher_kl": behaviour_T.exp()}  # rows drawn by the engine; its figures need not sum to 1
    world.streams = replace(world.streams, weights=weights)
    _, gradient_CV, _ = world.expected(SampledReverseKL(sampler="behaviour"))
    torch.testing.assert_close(gradient_CV, world.exact("reverse")[1], rtol=1e-11, atol=1e-12)
    _, wrong_CV, _ = world.expected(SampledReverseKL(sampler="old"))
    assert float((wrong_CV - gradient_CV).norm() / gradient_CV.norm()) > 0.1
    with pytest.raises(ObjectiveError, match="behaviour_logprobs"):
        streams = replace(world.streams, behaviour_logprobs_N=None)
        SampledReverseKL(sampler="behaviour")(world.statistics, streams)


def test_why_the_refused_ones_are_refused():
    """By autograd through their definitions: k1 as a loss teaches nothing, k3 as an advantage is a difference."""
    world = Enumeration(stale=False)
    weights_T = world.streams.weights["teacher_kl"]
    l_T = world.statistics.logprob_T - world.statistics.teacher_logprob_T
    grad = lambda loss: torch.autograd.grad(loss, world.logits_CV, retain_graph=True)[0]  # noqa: E731
    reverse_CV, forward_CV = world.exact("reverse")[1], world.exact("forward")[1]
    assert float(grad((weights_T * l_T).sum()).abs().max()) < 1e-14
    k3_T = torch.exp(-l_T) - 1 + l_T
    torch.testing.assert_close(grad((weights_T * k3_T).sum()), forward_CV)
    as_advantage_CV = grad((weights_T * k3_T.detach() * world.statistics.logprob_T).sum())
    torch.testing.assert_close(as_advantage_CV, reverse_CV - forward_CV)


def test_a_live_ratio_in_k2_would_be_wrong_on_stale_tokens():
    world = Enumeration(stale=True)
    ratio_T = (world.statistics.logprob_T - world.streams.old_logprobs_N).exp()
    l_T = world.statistics.logprob_T - world.statistics.teacher_logprob_T
    live = (world.streams.weights["teacher_kl"] * ratio_T * l_T.square() / 2).sum()
    live_CV = torch.autograd.grad(live, world.logits_CV, retain_graph=True)[0]
    reverse_CV = world.exact("reverse")[1]
    assert float((live_CV - reverse_CV).norm() / reverse_CV.norm()) > 0.2


def test_the_teachers_floor_and_the_ratio_clamp_count_what_they_touch():
    world = Enumeration(stale=True)
    world.statistics.teacher_logprob_T = world.statistics.teacher_logprob_T.clone()
    world.statistics.teacher_logprob_T[[3, 11]] = torch.tensor([-80.0, -500.0], dtype=torch.float64)
    old_T = world.streams.old_logprobs_N.clone()
    old_T[4] = -700.0
    world.streams = replace(world.streams, old_logprobs_N=old_T)
    value, _, evaluation = world.expected(SampledReverseKL(teacher_floor=-30.0, log_ratio_clamp=5.0))
    metrics = values(evaluation.metrics)
    assert math.isfinite(value) and metrics["nonfinite_rows"] == 0
    assert metrics["teacher_kl/teacher_floored"] == 2 and metrics["teacher_kl/ratio_clamped"] == 1
    assert metrics["teacher_kl/ratio_max"] == pytest.approx(math.exp(5.0))
    slope = evaluation.coefficients["logprob"][3] / world.streams.weights["teacher_kl"][3]
    ratio = (world.statistics.logprob_T[3] - old_T[3]).exp()
    assert float(slope) == pytest.approx((ratio * (world.statistics.logprob_T[3] + 30.0)).item(), rel=1e-12)
    assert metrics["teacher_kl/teacher_lacks"] == 0
    world.statistics.teacher_logprob_T[3] = math.nan
    _, _, bad = world.expected(SampledReverseKL(teacher_floor=-30.0))
    assert values(bad.metrics)["nonfinite_rows"] == 1  # a floor hides no NaN


def test_k3_of_a_token_that_the_teacher_loves_does_not_overflow():
    world = Enumeration(stale=False)
    world.statistics.logprob_T = torch.full((C * V,), -900.0, dtype=torch.float64)
    world.statistics.teacher_logprob_T = torch.full((C * V,), -1.0, dtype=torch.float64)
    result = K3ForwardKL()(world.statistics, world.streams)
    assert torch.isfinite(result.loss) and torch.isfinite(result.coefficients["logprob"]).all()


def test_each_legal_pair_has_a_term_that_reads_what_it_says():
    reads = {
        (divergence, estimator): teacher_divergence(divergence, estimator).statistics
        for divergence, estimators in ESTIMATORS.items()
        for estimator in estimators
    }
    assert reads == {
        ("reverse_kl", "exact"): ("kl",),
        ("reverse_kl", "topk_student_tail"): ("kl_topk_student_tail",),
        ("reverse_kl", "topk_student_stopgrad"): ("kl_topk_student_stopgrad",),
        ("reverse_kl", "topk_teacher_tail"): ("kl_topk_teacher_tail",),
        ("reverse_kl", "topk_teacher_stopgrad"): ("kl_topk_teacher_stopgrad",),
        ("reverse_kl", "sampled"): ("logprob", "teacher_logprob"),
        ("reverse_kl", "k2"): ("logprob", "teacher_logprob"),
        ("forward_kl", "exact"): ("forward_kl",),
        ("forward_kl", "k3"): ("logprob", "teacher_logprob"),
        ("jsd", "exact"): ("jsd",),
    }
    assert teacher_divergence("reverse_kl", "sampled", baseline=True).statistics == ("logprob", "teacher_logprob", "kl")
    assert "forward_kl" in teacher_divergence("forward_kl", "k3").name


def test_contradictory_options_are_refused():
    with pytest.raises(ObjectiveError, match="expected gradient zero"):
        teacher_divergence("reverse_kl", "k1")
    with pytest.raises(ObjectiveError, match="baseline belongs to estimator 'sampled'"):
        teacher_divergence("reverse_kl", "k2", baseline=True)
    with pytest.raises(ObjectiveError, match="floor"):
        teacher_divergence("reverse_kl", "exact", teacher_floor=-30.0)

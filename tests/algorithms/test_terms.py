import itertools
import math
from dataclasses import replace

import pytest
import torch

from megatron_dgrpo.algorithms.metrics import values
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import (
    ClippedSurrogate,
    entropy,
    forward_kl,
    jsd,
    nll,
    policy_metrics,
    reverse_kl,
    statistic,
)
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.testing.dense import DenseStatistics

T, V = 240, 13
LOW, HIGH = 0.2, 0.28


def case(old="stale", dtype=torch.float64):
    """Dense statistics and streams; stale old log-probs put >= 10 % of the rows beyond each bound for each sign."""
    torch.manual_seed(0)
    logits_TV = torch.randn(T, V, dtype=torch.float64).to(dtype).requires_grad_()
    targets_T = torch.randint(V, (T,))
    statistics = DenseStatistics.of(logits_TV, torch.randn(T, V, dtype=dtype), targets_T)
    kinds = torch.arange(T) % 6
    advantage_T = torch.where(kinds < 3, 1.0, -1.0).double() * (0.1 + torch.rand(T, dtype=torch.float64))
    advantage_T[::24] = 0.0
    bounds = torch.tensor([math.log(1 - LOW) - 0.3, 0.0, math.log(1 + HIGH) + 0.4], dtype=torch.float64)
    log_ratio_T = bounds[kinds % 3] + 0.1 * torch.randn(T, dtype=torch.float64).clamp(-2, 2)
    weights_T = torch.rand(T, dtype=torch.float64)
    weights_T[5::7] = 0.0
    streams = Streams(
        targets_N=targets_T,
        sample_N=torch.arange(T) // 8,
        position_N=torch.arange(T),
        weights={
            name: weights_T
            for name in ("surrogate", "teacher_kl", "teacher_forward_kl", "teacher_jsd", "entropy", "nll")
        },
        advantages_N=advantage_T,
        behaviour_logprobs_N=statistics.logprob_T.detach().double() + 0.01 * torch.randn(T, dtype=torch.float64),
        old_logprobs_N=statistics.logprob_T.detach().double() - log_ratio_T if old == "stale" else None,
    )
    return logits_TV, statistics, streams


def gradient(result, statistics, logits_TV):
    tensors = [getattr(statistics, f"{name}_T") for name in result.coefficients]
    return torch.autograd.grad(tensors, logits_TV, list(result.coefficients.values()), retain_graph=True)[0]


def assert_same(result, statistics, logits_TV, loss):
    expected_TV = torch.autograd.grad(loss, logits_TV, retain_graph=True)[0]
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-13, abs=1e-13)
    torch.testing.assert_close(gradient(result, statistics, logits_TV), expected_TV, rtol=1e-12, atol=1e-14)
    assert all(not c.requires_grad for c in result.coefficients.values())


def test_the_case_reaches_beyond_each_bound_for_each_sign():
    _, statistics, streams = case()
    ratio_T = (statistics.logprob_T.detach() - streams.old_logprobs_N).exp()
    acting_T = streams.weights["surrogate"] != 0
    for sign, beyond_T in itertools.product((1, -1), (ratio_T < 1 - LOW, ratio_T > 1 + HIGH)):
        share = ((streams.advantages_N.sign() == sign) & beyond_T & acting_T).sum() / acting_T.sum()
        assert share >= 0.1


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_clipped_surrogate_equals_autograd_of_its_formula(dual_clip):
    logits_TV, statistics, streams = case()
    result = ClippedSurrogate(clip_low=LOW, clip_high=HIGH, dual_clip=dual_clip)(statistics, streams)
    ratio_T, a_T = (statistics.logprob_T - streams.old_logprobs_N).exp(), streams.advantages_N
    gain_T = torch.minimum(ratio_T * a_T, ratio_T.clamp(1 - LOW, 1 + HIGH) * a_T)
    if dual_clip is not None:
        gain_T = torch.where(a_T < 0, torch.maximum(gain_T, dual_clip * a_T), gain_T)
    assert_same(result, statistics, logits_TV, -(streams.weights["surrogate"] * gain_T).sum())
    got, acting_T = values(result.metrics), streams.weights["surrogate"] != 0
    share = lambda rows_T: float((rows_T & acting_T).sum() / acting_T.sum())  # noqa: E731
    assert got["surrogate/clipped_high"] == pytest.approx(share((a_T > 0) & (ratio_T > 1 + HIGH)), rel=1e-6)
    assert got["surrogate/clipped_low"] == pytest.approx(share((a_T < 0) & (ratio_T < 1 - LOW)), rel=1e-6)
    assert got["surrogate/clipped_high"] >= 0.1 and got["surrogate/clipped_low"] >= 0.1
    assert (got["surrogate/clipped_dual"] > 0) == (dual_clip is not None)
    assert got["surrogate/ratio"] == pytest.approx(ratio_T[acting_T].mean().item())
    assert got["surrogate/ratio_max"] == pytest.approx(ratio_T[acting_T].max().item())
    assert got["surrogate/weight"] == pytest.approx(float(streams.weights["surrogate"].sum()))


def test_each_bound_binds_for_its_own_sign_only():
    """By hand: four tokens at r = 0.5 and r = 2, advantages of both signs."""
    old_T = -torch.tensor([0.5, 0.5, 2.0, 2.0]).double().log() - 1.0
    statistics = DenseStatistics(*[torch.full((4,), -1.0).double()] * 8)
    index = torch.arange(4)
    streams = Streams(
        targets_N=index, sample_N=index, position_N=index, weights={"surrogate": torch.ones(4).double()},
        advantages_N=torch.tensor([1.0, -1.0, 1.0, -1.0]).double(), old_logprobs_N=old_T,
    )  # fmt: skip
    result = ClippedSurrogate(clip_low=0.2, clip_high=0.3)(statistics, streams)
    assert result.values_T.tolist() == pytest.approx([-0.5, 0.8, -1.3, 2.0])
    assert result.coefficients["logprob"].tolist() == pytest.approx([-0.5, 0.0, 0.0, 2.0])


def test_without_old_logprobs_the_ratio_is_exactly_one():
    logits_TV, statistics, streams = case(old=None)
    result = ClippedSurrogate(clip_low=LOW, clip_high=HIGH, dual_clip=3.0)(statistics, streams)
    ratio_T = (statistics.logprob_T - statistics.logprob_T.detach()).exp()
    assert_same(result, statistics, logits_TV, -(streams.weights["surrogate"] * streams.advantages_N * ratio_T).sum())
    assert (result.rows["ratio"] == 1.0).all()
    assert torch.equal(result.coefficients["logprob"], -streams.weights["surrogate"] * streams.advantages_N)


def test_the_ratio_clamp_counts_what_it_touches_and_never_overflows():
    logits_TV, statistics, streams = case(dtype=torch.float32)
    old_T = streams.old_logprobs_N.clone()
    old_T[:4] -= 500.0
    old_T[4:6] += 500.0
    streams = replace(streams, old_logprobs_N=old_T)
    result = ClippedSurrogate(log_ratio_clamp=10.0)(statistics, streams)
    assert torch.isfinite(result.loss) and torch.isfinite(result.coefficients["logprob"]).all()
    acting_T = streams.weights["surrogate"][:6] != 0
    assert values(result.metrics)["surrogate/ratio_clamped"] == int(acting_T.sum()) < 6
    assert not result.coefficients["logprob"][:6].any()
    assert values(result.metrics)["surrogate/ratio_max"] == pytest.approx(math.exp(10.0), rel=1e-5)


@pytest.mark.parametrize(
    "term, loss",
    [
        (reverse_kl(), lambda s: s.kl_T),
        (forward_kl(), lambda s: s.forward_kl_T),
        (jsd(), lambda s: s.jsd_T),
        (entropy(), lambda s: -s.entropy_T),
        (nll(), lambda s: -s.logprob_T),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_statistic_terms_have_the_stated_sign(term, loss):
    logits_TV, statistics, streams = case()
    result = term(statistics, streams)
    assert_same(result, statistics, logits_TV, (streams.weights[term.name] * loss(statistics)).sum())
    assert set(result.coefficients) == set(term.statistics)
    acting_T = streams.weights[term.name] != 0
    (name,) = term.statistics
    assert values(result.metrics)[f"{term.name}/{name}"] == pytest.approx(
        getattr(statistics, f"{name}_T")[acting_T].mean().item()
    )


@pytest.mark.parametrize("term", [ClippedSurrogate(), reverse_kl(), nll()], ids=lambda t: t.name)
def test_zero_rows_give_zero_and_the_same_metric_names(term):
    _, statistics, streams = case()
    nothing = DenseStatistics(*(x[:0] for x in vars(statistics).values()))
    empty = term(nothing, streams.select(torch.arange(0)))
    assert float(empty.loss) == 0.0 and all(c.shape == (0,) for c in empty.coefficients.values())
    assert set(empty.metrics) == set(term(statistics, streams).metrics)
    names = {*policy_metrics(nothing, streams.select(torch.arange(0)))}
    assert names == {*policy_metrics(statistics, streams)}


def test_a_weight_of_zero_silences_nan():
    _, statistics, streams = case()
    statistics.kl_T = torch.where(streams.weights["teacher_kl"] == 0, math.nan, statistics.kl_T.detach())
    assert statistics.kl_T.isnan().any()
    result = reverse_kl()(statistics, streams)
    assert torch.isfinite(result.loss) and torch.isfinite(result.coefficients["kl"]).all()
    assert math.isfinite(values(result.metrics)["teacher_kl/kl"])


def test_weights_that_sum_to_zero_are_a_logged_zero():
    _, statistics, streams = case()
    silent = replace(streams, weights={"surrogate": torch.zeros(T).double()})
    result = ClippedSurrogate()(statistics, silent)
    got = values(result.metrics)
    assert got["surrogate/loss"] == 0.0 and got["surrogate/weight"] == 0.0
    assert not result.coefficients["logprob"].any()


def test_policy_metrics_say_how_far_the_policy_moved():
    _, statistics, streams = case()
    got = values(policy_metrics(statistics, streams))
    log_T = statistics.logprob_T.detach() - streams.old_logprobs_N
    assert got["policy/moved_kl"] == pytest.approx((log_T.exp() - 1 - log_T).mean().item())
    _, statistics, streams = case(old=None)
    got = values(policy_metrics(statistics, streams))
    assert "policy/moved_kl" not in got
    assert got["policy/entropy"] == pytest.approx(statistics.entropy_T.mean().item())


def test_what_is_missing_is_named():
    _, statistics, streams = case()
    with pytest.raises(ObjectiveError, match="no weights for term 'other'"):
        reverse_kl("other")(statistics, streams)
    with pytest.raises(ObjectiveError, match="'nothing' was not computed"):
        statistic(statistics, "nothing")
    with pytest.raises(ObjectiveError, match="advantages"):
        ClippedSurrogate()(statistics, replace(streams, advantages_N=None))

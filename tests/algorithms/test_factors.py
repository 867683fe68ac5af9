import pytest

from megatron_dgrpo.algorithms.build import dgrpo_loss, head_options
from megatron_dgrpo.algorithms.factors import Factors
from megatron_dgrpo.config.objective import Objective
from megatron_dgrpo.errors import ConfigError

ADAPTIVE = {"kind": "adaptive", "initial": 0.5, "target": 0.1, "rate": 0.5, "max_error": 0.4}


def factors_of(**settings):
    objective = Objective.model_validate(settings)
    return Factors(objective, dgrpo_loss(objective)[0])


def test_each_term_has_its_schedule():
    factors = factors_of(
        beta={"kind": "linear", "start": 0.0, "end": 1.0, "steps": 4},
        entropy={"kind": "cosine", "start": 0.2, "end": 0.0, "steps": 2},
    )
    assert factors.at(0) == {"surrogate": 1.0, "teacher_kl": 0.0, "entropy": 0.2}
    assert factors.at(1) == pytest.approx({"surrogate": 1.0, "teacher_kl": 0.25, "entropy": 0.1})
    assert factors.at(9) == pytest.approx({"surrogate": 1.0, "teacher_kl": 1.0, "entropy": 0.0})
    factors.observe({"teacher_kl/kl": 5.0})
    assert factors.at(1)["teacher_kl"] == 0.25 and factors.state() == {}


@pytest.mark.parametrize(
    "settings, name, figure",
    [
        ({}, "teacher_kl", "teacher_kl/kl"),
        ({"divergence": "forward_kl"}, "teacher_forward_kl", "teacher_forward_kl/forward_kl"),
        ({"divergence": "jsd"}, "teacher_jsd", "teacher_jsd/jsd"),
        ({"estimator": {"kind": "topk_student"}}, "teacher_kl", "teacher_kl/kl_topk_student_tail"),
        ({"estimator": "sampled"}, "teacher_kl", "teacher_kl/k1"),
        ({"estimator": "k2"}, "teacher_kl", "teacher_kl/k1"),
    ],
)
def test_the_adaptive_factor_follows_what_the_estimator_reports(settings, name, figure):
    factors = factors_of(beta=ADAPTIVE, **settings)
    assert factors.figure == figure
    factors.observe({"teacher_kl/other": 9.0})
    assert factors.at(3)[name] == 0.5
    factors.observe({figure: 0.12})  # 20 % above the target
    assert factors.at(3)[name] == pytest.approx(0.5 * (1 + 0.5 * 0.2))
    factors.observe({figure: 0.0})  # an error of -1 counts -0.4
    assert factors.at(3)[name] == pytest.approx(0.55 * (1 - 0.5 * 0.4))


def test_the_state_goes_on_where_it_was():
    first, second = factors_of(beta=ADAPTIVE), factors_of(beta=ADAPTIVE)
    first.observe({"teacher_kl/kl": 1.0})
    second.restore(first.state())
    assert second.at(0) == first.at(0) != factors_of(beta=ADAPTIVE).at(0)
    with pytest.raises(ConfigError, match="saved with another schedule"):
        factors_of().restore(first.state())
    with pytest.raises(ConfigError, match="resume"):
        second.restore({})


def test_the_objectives_settings_reach_terms_and_heads():
    settings = {"dual_clip": 3.0, "log_ratio_clamp": 5.0, "entropy": 0.1}
    estimator = {"kind": "sampled", "baseline": True, "teacher_floor": -9.0}
    loss, factors = dgrpo_loss(Objective.model_validate(settings | {"estimator": estimator}))
    surrogate, sampled, entropy = loss.terms
    assert (surrogate.dual_clip, surrogate.log_ratio_clamp) == (3.0, 5.0)
    assert (sampled.baseline, sampled.teacher_floor, sampled.log_ratio_clamp) == (True, -9.0, 5.0)
    assert entropy.name == "entropy" and factors == {"surrogate": 1.0, "teacher_kl": 0.5, "entropy": 0.1}
    assert head_options(Objective()) == {}
    topk = Objective.model_validate({"estimator": {"kind": "topk_teacher", "k": 9}})
    assert head_options(topk) == {"topk": 9} and dgrpo_loss(topk)[0].statistics == {"logprob", "kl_topk_teacher_tail"}
    assert head_options(Objective.model_validate({"divergence": {"kind": "jsd", "alpha": 0.2}})) == {"jsd_alpha": 0.2}

"""Names of figures that settings may name: those of another stage are refused, with the nearest one."""

from __future__ import annotations

from typing import Any

import pytest
from test_config_checks import data, problems, spoilt


def _said(number: int, conditions: Any) -> list[str]:
    return problems(spoilt((f"stages.{number}.stop_when", conditions)))


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "nll/loss"),
        (0, "heldout/reward"),
        (1, "heldout/score/exact_match"),
        (1, "reward/mean"),
        (1, "surrogate/ratio_max"),
        (1, "teacher_kl/kl"),
        (1, "mismatch/k3@4096"),
        (1, "preflight/second_score"),
        (1, "response/truncated"),
    ],
)
def test_what_a_stage_reports_may_end_it(number: int, name: str) -> None:
    assert data()["stages"][number]["kind"] == ("sft", "dgrpo")[number]
    assert _said(number, {"metric": name, "above": 0.5}) == []


def test_a_name_that_the_stage_never_reports_is_refused() -> None:
    (said,) = _said(1, {"metric": "heldout/rewards", "above": 0.5})
    assert (
        said == "stages.1.stop_when.0.metric: this stage reports no 'heldout/rewards'; did you mean 'heldout/reward'?"
    )
    (said,) = _said(0, [{"metric": "loss", "below": 1}, {"metric": "reward/mean", "above": 0.5}])
    assert said.startswith("stages.0.stop_when.1.metric: this stage reports no 'reward/mean'")
    (said,) = _said(0, {"metric": "surrogate/ratio", "above": 0.5})
    assert "reports no 'surrogate/ratio'" in said
    without = problems(spoilt(("evaluation", None), ("stages.1.stop_when", {"metric": "heldout/reward", "above": 1})))
    assert any("heldout/reward comes from evaluations" in problem for problem in without)


def test_a_condition_has_one_limit() -> None:
    for limits in ({}, {"above": 1, "below": 2}):
        (said,) = _said(0, {"metric": "loss"} | limits)
        assert said == "stages.0.stop_when.0.above: give a limit: either above or below"

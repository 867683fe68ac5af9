"""What each kind of stage has, what it cannot say, and what is refused with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from test_config_checks import data, only, problems, spoilt

from megatron_dgrpo.config.objective import GRPOObjective, Objective, OPDObjective
from megatron_dgrpo.config.schema import OPD, OnPolicy


def stage(kind: str, *without: str, **changes: Any) -> tuple[str, Any]:
    base = data()["stages"][1] | {"kind": kind} | changes
    return "stages.1", {key: value for key, value in base.items() if key not in without}


def static(kind: str, **changes: Any) -> tuple[str, Any]:
    return "stages.0", data()["stages"][0] | {"kind": kind} | changes


def test_the_kinds_of_rollouts_are_one_algorithm_with_more_or_fewer_terms() -> None:
    no_teacher = ("teachers", [])
    assert problems(spoilt(stage("grpo"), no_teacher)) == problems(spoilt(stage("opd"))) == []
    opd = spoilt(stage("opd", "group_size", "rewards")).stages[1]
    assert isinstance(opd, OPD) and isinstance(opd, OnPolicy) and opd.group_size == 1 and opd.rewards == ()
    assert opd.objective.beta.value == 1.0 and opd.uses_teacher
    assert opd.objective.divergence.kind == "reverse_kl" and opd.objective.estimator.kind == "exact"
    grpo = spoilt(stage("grpo"), no_teacher).stages[1]
    assert isinstance(grpo, OnPolicy) and not grpo.uses_teacher
    shared = OPDObjective.model_fields.keys() & GRPOObjective.model_fields.keys()
    assert shared == {"entropy", "aggregation", "log_ratio_clamp", "overlong"}
    assert Objective.model_fields.keys() == OPDObjective.model_fields.keys() | GRPOObjective.model_fields.keys()


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("grpo", {"beta": 0.5}),
        ("grpo", {"estimator": "exact"}),
        ("opd", {"clip_low": 0.1}),
        ("opd", {"advantages": {"kind": "mean"}}),
        ("opd", {"overlong": "mask_surrogate"}),
    ],
)
def test_what_an_algorithm_lacks_has_no_key(kind: str, objective: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spoilt(stage(kind, objective=objective))


def test_kd_has_no_sampled_estimator() -> None:
    with pytest.raises(ValidationError):
        spoilt(static("kd", objective={"estimator": "k2"}))
    assert problems(spoilt(static("kd", objective={"divergence": "reverse_kl", "estimator": "topk_student"}))) == []
    assert only(static("kd", objective={"estimator": "topk_teacher"})).startswith("stages.0.objective.estimator:")


def test_teachers_that_are_missing_or_idle() -> None:
    found = problems(spoilt(("teachers", []), static("kd"), stage("opd")))
    assert found == [
        f"stages.{i}.objective.beta: the KL needs a teacher; add teachers: [{{model: NAME}}]" for i in (0, 1)
    ]
    assert only(stage("grpo")).startswith("teachers: listed, but no stage uses one (there is no dgrpo, opd or kd stage")
    assert any(
        p.startswith("stages.0.objective.beta: 0, and this stage learns from the teacher")
        for p in problems(spoilt(static("kd", objective={"beta": 0})))
    )


def test_rewards_of_opd_are_not_learnt_from() -> None:
    weighted = stage("opd", rewards=[{"kind": "exact_match", "weight": 2.0}])
    assert only(weighted).startswith("stages.1.rewards.0.weight: 2, and an opd stage reports rewards and learns from")
    idle = stage("grpo", rewards=[{"kind": "exact_match", "weight": 0.0}])
    assert only(idle, ("teachers", [])).startswith("stages.1: all rewards have weight 0")


def test_batches_of_static_data() -> None:
    path, good = static("sft")
    without = {key: value for key, value in good.items() if key not in ("steps", "batch_size")}
    assert problems(spoilt((path, without))) == [
        "stages.0.batch_size: missing; add it (Examples a step), or batch_tokens",
        "stages.0.steps: missing; add it (Batches to train on), or epochs",
    ]
    assert problems(spoilt((path, without | {"batch_tokens": 512, "epochs": 1.5}))) == []
    assert only((path, good | {"batch_tokens": 512})).startswith("stages.0.batch_tokens: batch_size says")
    assert only((path, good | {"epochs": 2})).startswith("stages.0.epochs: steps says how long the stage is, too")
    stream = without | {"batch_size": 2, "epochs": 1, "data": {"path": "data/x.jsonl", "streaming": True}}
    assert only((path, stream)).startswith("stages.0.epochs: a stream has no length")
    sources = [{"path": "data/x.jsonl"}, {"path": "data/y.jsonl"}]
    assert only((path, stream | {"data": {"mixture": sources}})).startswith("stages.0.epochs: sources of a mixture")


def test_passes_over_a_batch_need_all_of_it() -> None:
    periodic = stage("dgrpo", schedule="periodic", epochs_per_batch=2)
    assert only(periodic).startswith("stages.1.epochs_per_batch: the periodic schedule makes one update")
    several = spoilt(stage("dgrpo", updates_per_batch=4, epochs_per_batch=3, steps=5)).stages[1]
    assert several.num_updates == 60


def test_master_weights_of_fewer_bits_are_for_models_in_bfloat16() -> None:
    adam = {"lr": 1e-3, "precision_aware": {"exp_avg": "bfloat16"}}
    assert only(("stages.0.optimizer", adam)).startswith("stages.0.optimizer.precision_aware: master weights")
    assert problems(spoilt(("stages.0.optimizer", adam), ("models.small.dtype", "bfloat16"))) == []


def test_what_happens_to_updates_that_are_not_finite() -> None:
    assert spoilt(static("sft")).stages[0].on_nonfinite.kind == "stop"
    skip = spoilt(static("sft", on_nonfinite="skip")).stages[0].on_nonfinite
    assert skip.kind == "skip" and skip.in_a_row == 10
    with pytest.raises(ValidationError, match="in_a_row"):
        spoilt(static("sft", on_nonfinite={"kind": "skip", "in_a_row": 0}))
    with pytest.raises(ValidationError, match="on_nonfinite"):
        spoilt(static("sft", on_nonfinite={"kind": "stop", "in_a_row": 3}))

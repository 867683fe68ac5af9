"""A real run through every kind of stage, with a teacher on a rank of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.metric_names import is_reported
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics

ROWS = 10


def _config(files: Path, folder: Path) -> dict[str, Any]:
    lines = (files / "task/train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"path": str(folder / "rows.jsonl")}
    adam = {"lr": 1e-3, "warmup_steps": 1, "schedule": "cosine"}
    model = {"dtype": "float32"}
    static = {"data": data, "optimizer": adam}
    rollouts = static | {"engine": "rollout", "prompts_per_step": 4, "sampling": {"max_tokens": 4}, "steps": 2}
    rewards = [{"kind": "exact_match"}]
    return {
        "run_dir": str(folder / "run"),
        "models": {name: model | {"path": str(files / name)} for name in ("student", "teacher")},
        "student": "student",
        "teachers": [{"model": "teacher", "ranks": "own"}],
        "engines": {"rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26}},
        "stages": [
            static | {"kind": "sft", "batch_tokens": 40, "epochs": 1.5},
            static | {"kind": "kd", "batch_size": 4, "epochs": 1, "objective": {"nll": 0.5}},
            rollouts | {"kind": "opd"},
            rollouts
            | {"kind": "grpo", "group_size": 4, "rewards": rewards, "updates_per_batch": 2, "epochs_per_batch": 2},
            rollouts
            | {"kind": "dgrpo", "group_size": 2, "rewards": rewards, "objective": {"overlong": "mask_surrogate"}},
        ],
    }


@pytest.mark.timeout(900)
def test_a_run_through_every_kind_of_stage(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_config(files, tmp_path)), encoding="utf-8")
    assert train(load(path)) == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl").records
    stages = load(path).stages
    names = {(r["stage_number"], name) for r in records for name in r.keys() - {"update", "tokens_per_s"}}
    figures = {(number, name) for number, name in names if not name.startswith(("time", "stage", "step"))}
    unknown = [(n, name) for n, name in figures if not is_reported(load(path), stages[n], name)]
    assert not unknown, "stop_when would refuse them"
    of_kind = {kind: [r for r in records if r["stage"] == kind] for kind in ("sft", "kd", "opd", "grpo", "dgrpo")}
    sft, kd = of_kind["sft"], of_kind["kd"]
    assert all(r["tokens"] >= 40 for r in sft) and sum(r["examples"] for r in sft) >= 1.5 * ROWS
    assert sum(r["examples"] for r in sft[:-1]) < 1.5 * ROWS, "no more steps than the epochs fill"
    assert [r["examples"] for r in kd] == [4.0] * math.ceil(ROWS / 4)
    for r in kd:
        assert r["loss"] == pytest.approx(r["teacher_forward_kl/loss"] + 0.5 * r["nll/loss"], rel=1e-5)
    assert "preflight/second_score" in kd[0]
    assert all(r["loss"] == pytest.approx(r["teacher_kl/loss"]) and "reward/mean" not in r for r in of_kind["opd"])
    assert all("teacher_kl/loss" not in r and "reward/mean" in r for r in of_kind["grpo"])
    assert [r["update"] for r in of_kind["grpo"]] == [1, 2, 3, 4] * 2
    assert all(r["surrogate/ratio"] == pytest.approx(1.0, abs=1e-6) for r in of_kind["grpo"] if r["update"] == 1)
    assert all({"surrogate/loss", "teacher_kl/loss"} <= r.keys() for r in of_kind["dgrpo"])
    rates = [r["lr"] for r in of_kind["grpo"]]
    assert rates == pytest.approx([1e-3] + [5e-4 * (1 + math.cos(math.pi * k / 7)) for k in range(7)])

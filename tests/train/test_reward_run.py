"""Rewards in a real run: one that fails leaves out its prompt and is told; what cannot work is said first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics

USERS = """
import os, sys
def once(text, *, answer, prompt, fields):
    assert "torch" not in sys.modules and fields["answer"] == answer and fields["prompt"] == prompt
    try:
        os.close(os.open(os.environ["FAILED_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return len(text)
    raise RuntimeError("the first time")
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    from megatron_dgrpo.testing.one_hop_models import write_models

    write_models(tmp_path, 0)
    (tmp_path / "users").mkdir()
    (tmp_path / "users/my_own.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path / "users")
    monkeypatch.setenv("FAILED_ONCE", str(tmp_path / "failed"))
    return {
        "run_dir": str(tmp_path / "run"),
        "models": {"student": {"path": str(tmp_path / "student"), "dtype": "float32"}},
        "student": "student",
        "engines": {"rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26}},
        "stages": [
            {
                "kind": "dgrpo",
                "data": {"path": str(tmp_path / "task/train.jsonl")},
                "steps": 2,
                "engine": "rollout",
                "prompts_per_step": 4,
                "group_size": 4,
                "sampling": {"max_tokens": 4},
                "objective": {"beta": 0},
                "optimizer": {"lr": 1e-3},
                "rewards": [
                    {"kind": "token_f1", "weight": 2.0},
                    {"kind": "function", "function": "my_own:once", "name": "own", "weight": -0.5},
                ],
            }
        ],
    }


def test_a_reward_that_fails_leaves_out_its_prompt(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert train(load(path)) == 0
    first, second = read_metrics(tmp_path / "run/metrics.jsonl").records
    assert (first["reward/failed/own"], first["reward/skipped"], first["groups"]) == (1, 1, 3)
    assert "reward/failed/own" not in second and "reward/skipped" not in second and second["groups"] == 4
    for record in (first, second):
        assert record["reward/score/own"] > 0
        total = 2 * record["reward/score/token_f1"] - 0.5 * record["reward/score/own"]
        assert record["reward/mean"] == pytest.approx(total)
    said = (tmp_path / "run/logs/rank0.log").read_text()
    assert "own on 1 of 4 responses; 1 prompts are left out" in said and "RuntimeError('the first time')" in said


def test_what_cannot_work_is_said_before_anything_starts(config: dict[str, Any], tmp_path: Path) -> None:
    config["stages"][0]["rewards"] += [
        {"kind": "function", "function": "my_own:twice", "name": "twice"},
        {"kind": "code", "isolation": "best_effort"},
        {"kind": "judge", "url": "http://127.0.0.1:9/v1", "model": "m"},
    ]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError) as caught:
        train(load(path))
    said = str(caught.value)
    assert "stages.0.rewards: reward twice cannot be used" in said and "has no attribute 'twice'" in said
    assert "code reads the field 'tests'" in said and "the judge at http://127.0.0.1:9/v1 does not answer" in said
    assert not (tmp_path / "run/logs/rank0.log").exists()

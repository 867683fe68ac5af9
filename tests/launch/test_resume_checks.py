"""A run's folder before the run starts: who works there, and what a run may not go on with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.checkpoint.manifest import FORMAT, MANIFEST, Manifest
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.errors import CheckpointError, LaunchError
from megatron_dgrpo.launch.resume import check_resume, identities, locked
from megatron_dgrpo.testing.tiny import save_tiny_qwen3


def test_a_folder_is_one_runs_and_nobody_inherits_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        with pytest.raises(LaunchError, match=r"in use: process \d+ on "), locked(tmp_path):
            pass
    try:
        with locked(tmp_path):  # although a process that was started meanwhile is still there
            pass
    finally:
        child.communicate(b"\n")


def _config(folder: Path, **changes: Any) -> Config:
    stage = {
        "kind": "sft",
        "data": {"path": str(folder / "rows.jsonl")},
        "steps": 3,
        "batch_size": 2,
        "optimizer": {"lr": 0.1},
    }
    settings = {
        "run_dir": str(folder / "run"),
        "models": {"student": {"path": str(folder / "model")}},
        "student": "student",
        "stages": [stage, stage, stage],
    }
    return Config.model_validate(settings | changes)


def test_what_a_run_may_not_go_on_with(tmp_path: Path) -> None:
    save_tiny_qwen3(tmp_path / "model", vocab_size=96)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    config = _config(tmp_path)
    made_with = identities(config)
    folder = tmp_path / "run/checkpoints/01-000002"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(Manifest(1, 2, made_with, {}).encode())
    check_resume(config, made_with)

    def refused(**changes: Any) -> list[str]:
        other = _config(tmp_path, **changes)
        try:
            check_resume(other, identities(other))
        except CheckpointError as error:
            names = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
            allowed = _config(tmp_path, **changes, resume={"allow": names})
            check_resume(allowed, identities(allowed))
            return names
        return []

    stages = config.model_dump(mode="json")["stages"]
    longer, sooner = stages[0] | {"steps": 4}, stages[0] | {"data": stages[0]["data"] | {"prompt": "answer"}}
    assert refused(seed=1) == ["seed"]
    assert refused(stages=[longer, *stages[1:]]) == ["stages.0"], "a past stage was another one"
    assert refused(stages=[stages[0], longer, longer]) == [], "the stage that goes on, and later ones, may change"
    assert refused(stages=[*stages[:2], sooner]) == []
    assert refused(stages=[stages[0], sooner, stages[2]]) == ["stages.1.data"], "its place is one in its own data"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    assert refused() == ["stages.0.data", "stages.1.data"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/other.safetensors")
    assert refused() == ["models.student.path"]
    (tmp_path / "model/other.safetensors").rename(tmp_path / "model/model.safetensors")
    renamed = {"models": {"it": {"path": str(tmp_path / "model")}}, "student": "it"}
    assert refused(**renamed) == [], "the same model under another name"

    for form, project in ((FORMAT + 1, "7.0"), (FORMAT - 1, "0.0.1")):  # a newer version's, an older one's
        (folder / MANIFEST).write_bytes(Manifest(1, 2, made_with, {}, format=form, project=project).encode())
        with pytest.raises(
            CheckpointError, match=f"was written by version {project} in the format {form}; this version"
        ):
            check_resume(config, made_with)
    (folder / MANIFEST).write_text("{")
    check_resume(config, made_with)  # damage is for the ranks to find, and to set aside
    folder.rename(folder.with_name("01-000002.damaged"))
    with pytest.raises(CheckpointError, match="No checkpoint of .* is whole"):
        check_resume(config, made_with)

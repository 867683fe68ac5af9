"""What a dry run refuses, what it lists as not checked, and what it leaves behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dgrpo.cli import main
from megatron_dgrpo.launch.dry_run import config_json_alone
from megatron_dgrpo.testing.distributed import run_forked


def _make(folder: str) -> None:
    from megatron_dgrpo.testing.one_hop_models import write_models

    write_models(Path(folder), 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_hop")
    run_forked(_make, str(folder))
    alone = folder / "config_json_alone"
    alone.mkdir()
    shutil.copyfile(folder / "teacher/config.json", alone / "config.json")
    return folder


def _write(files: Path, where: Path, **changes: Any) -> Path:
    data = {"path": str(files / "task/train.jsonl")}
    layout = {"tp": 2, "sequence_parallel": True, "pp": 2}
    config = {
        "run_dir": str(where / "runs/run"),
        "models": {
            "student": {"path": str(files / "student"), "dtype": "float32", "layout": layout},
            "teacher": {"path": str(files / "config_json_alone"), "dtype": "float32"},
        },
        "student": "student",
        "teachers": [{"model": "teacher", "ranks": "own"}],
        "engines": {"rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26}},
        "stages": [
            {"kind": "sft", "data": data, "steps": 2, "batch_size": 8, "optimizer": {"lr": 1e-2}},
            {
                "kind": "dgrpo", "data": data, "engine": "rollout", "steps": 1, "prompts_per_step": 4, "group_size": 4,
                "rewards": [{"kind": "exact_match"}], "sampling": {"max_tokens": 4}, "optimizer": {"lr": 1e-3},
            },
        ],
    }  # fmt: skip
    path = where / "config.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def test_a_dry_run(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(files, tmp_path)
    assert main(["train", str(path), "--dry-run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    sft, dgrpo = said.split("stages.1")
    assert [line.split()[:3] for line in sft.splitlines() if " to " in line and "KiB" in line] == [
        ["0", "to", "1"],
        ["2", "to", "3"],
    ]
    last = [line for line in dgrpo.splitlines() if re.match(r" +4 ", line)]
    assert len(last) == 1  # the teacher's own rank
    assert "Not checked: 2\n- models.teacher: weights and tokenizer" in said
    assert "give --device-memory 80GiB" in said
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.yaml", "runs"}
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["run.resolved.yaml"]


def test_what_cannot_be_reached_and_what_is_wrong(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stage = {
        "kind": "dgrpo", "data": {"hub": "someone/something"}, "engine": "rollout", "steps": 1, "prompts_per_step": 4,
        "group_size": 4, "sampling": {"max_tokens": 4}, "optimizer": {"lr": 1e-3},
        "rewards": [{"kind": "judge", "url": "http://127.0.0.1:9/v1", "model": "m"}],
    }  # fmt: skip
    path = _write(files, tmp_path, stages=[stage])
    assert main(["train", str(path), "--dry-run", "--device-memory", "1GiB"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "- stages.0.data: someone/something can't be read" in said
    assert "- stages.0.rewards: reward judge cannot be used: the judge at http://127.0.0.1:9/v1" in said
    stage["rewards"] = [{"kind": "function", "function": "nowhere_at_all:score"}]
    path = _write(files, tmp_path, stages=[stage])
    assert main(["train", str(path), "--dry-run"]) == 2
    assert "nowhere_at_all" in capsys.readouterr().err


def test_a_device_that_is_too_small(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(files, tmp_path)
    assert main(["train", str(path), "--dry-run", "--device-memory", "1MiB"]) == 2
    said = capsys.readouterr()
    assert "bytes on each rank" in said.out and "of a device's 1 MiB" in said.err
    assert not (tmp_path / "runs").exists()


def test_a_layout_that_the_model_rules_out(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(files, tmp_path)
    assert main(["train", str(path), "--dry-run", "models.teacher.layout.tp=3"]) == 2
    assert "models.teacher.layout: tp=3 does not divide" in capsys.readouterr().err


def test_a_folder_with_config_json_alone(tmp_path: Path) -> None:
    assert not config_json_alone(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert config_json_alone(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert not config_json_alone(tmp_path)

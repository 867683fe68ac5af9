"""A run that was killed, interrupted or damaged goes on as if nothing had been; what it must not go on with is refused.

Every run here is a real one: ranks at TP2, a vLLM engine, a teacher, weight transfers, checkpoints at every step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from megatron_dgrpo.checkpoint.manifest import checkpoints, verify
from megatron_dgrpo.observe.events import read_events
from megatron_dgrpo.observe.metrics import read_metrics

WALL_CLOCK = ("time", "time/", "tokens_per_s")
LAST = (1, 4)
"""Stage and number of the last step."""


def _config(files: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """SFT for two steps, dGRPO for four with two updates each, an adaptive beta, held-out rewards at every other."""
    data = {"path": str(files / "task/train.jsonl")}
    layout = {"tp": 2, "sequence_parallel": True}
    rewards = [{"kind": "exact_match"}]
    config = {
        "run_dir": str(run_dir),
        "models": {
            name: {"path": str(files / name), "dtype": "float32", "layout": layout} for name in ("student", "teacher")
        },
        "student": "student",
        "teachers": [{"model": "teacher"}],
        "engines": {"rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26}},
        "rollout": {"deterministic": True},
        "evaluation": {
            "data": {"path": str(files / "task/heldout.jsonl")},
            "engine": "rollout",
            "num_prompts": 16,
            "sampling": {"max_tokens": 4},
            "rewards": rewards,
            "every": 2,
        },
        "checkpoints": {"every": 1},
        "stages": [
            {"kind": "sft", "data": data, "steps": 2, "batch_size": 8, "optimizer": {"lr": 1e-2, "warmup_steps": 3}},
            {
                "kind": "dgrpo",
                "data": data,
                "engine": "rollout",
                "prompts_per_step": 4,
                "group_size": 4,
                "steps": LAST[1],
                "updates_per_batch": 2,
                "rewards": rewards,
                "sampling": {"max_tokens": 4, "temperature": 0.7},
                "objective": {"beta": {"kind": "adaptive", "initial": 0.5, "target": 1e-3}},
                "optimizer": {"lr": 1e-3, "warmup_steps": 5},
            },
        ],
    }
    return config | changes


def _start(folder: Path, config: dict[str, Any], *overrides: str) -> subprocess.Popen[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_dgrpo.cli", "train", str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _ends(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=280)
    assert process.returncode == status, f"{process.returncode}\n{out}\n{err}"
    return out, err


def _wait(process: subprocess.Popen[str], condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def _wrote(run_dir: Path, *words: str) -> Callable[[], bool]:
    """Whether metrics.jsonl has a line with all of these words."""
    path = run_dir / "metrics.jsonl"
    return lambda: path.exists() and any(all(w in line for w in words) for line in path.read_text().splitlines())


def _figures(run_dir: Path) -> list[dict[str, Any]]:
    """Every record, but for what the clock says."""
    return [
        {key: value for key, value in record.items() if key not in WALL_CLOCK and not key.startswith("time/")}
        for record in read_metrics(run_dir / "metrics.jsonl").records
    ]


def _same(run_dir: Path, other: Path) -> None:
    """Bit for bit: the figures of every step, and the weights at the end."""
    ours, theirs = _figures(run_dir), _figures(other)
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one == two, {key: (one.get(key), two.get(key)) for key in one | two if one.get(key) != two.get(key)}
    mine, his = (load_file(folder / "hf/model.safetensors") for folder in (run_dir, other))
    assert mine.keys() == his.keys() and all((mine[name] == his[name]).all() for name in mine)


@pytest.fixture(scope="module")
def unbroken(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    _ends(_start(folder, _config(files, folder / "run")))
    return folder / "run"


def _said(run_dir: Path, kind: str) -> list[str]:
    return [event["words"] for event in read_events(run_dir / "events.jsonl").records if event["kind"] == kind]


def test_a_run_that_is_killed_in_a_step_and_in_a_save_ends_as_if_it_had_not_been(
    files: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = _start(tmp_path, _config(files, run_dir))
    _wait(first, _wrote(run_dir, '"stage_number": 1, "step": 2, "update": 1'), "no second step")
    first.kill()
    first.communicate()
    assert _figures(run_dir) == _figures(unbroken)[: len(_figures(run_dir))]

    second = _start(tmp_path, _config(files, run_dir))
    (saving,) = [run_dir / f"checkpoints/.{LAST[0]:02d}-{3:06d}.partial"]
    _wait(second, saving.exists, "no save of the third step")
    second.kill()
    second.communicate()
    left = [path.name for path in checkpoints(run_dir)]
    assert left[0] in ("01-000002", "01-000003") and verify(run_dir / "checkpoints" / left[0]) == []

    _ends(_start(tmp_path, _config(files, run_dir)))
    _same(run_dir, unbroken)
    assert sum(words.startswith("goes on from checkpoint") for words in _said(run_dir, "resume")) == 2
    assert len(_said(run_dir, "start")) == 3 and (run_dir / "metrics.removed.jsonl").exists()
    assert not list((run_dir / "checkpoints").glob(".*"))
    out, _ = _ends(_start(tmp_path, _config(files, run_dir)))
    assert "finished: nothing is done" in out

"""What a run does about its rollouts: limits of the mismatch, and the same bits again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from test_loop import _config, _write

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics


def test_a_mismatch_beyond_its_limits_warns_or_ends_the_run(
    files: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = _config(files, tmp_path / "run")
    config["stages"] = [config["stages"][2] | {"mismatch": {"warn": {"abs": 1e-12}, "stop": {"max": 1.0}}}]
    assert train(load(_write(tmp_path, config))) == 0
    assert "step 1, update 1: The trainer's and the engine's log-probs" in capfd.readouterr().out
    config |= {"run_dir": str(tmp_path / "stopped")}
    config["stages"][0]["mismatch"] = {"stop": {"abs": 1e-12}, "warn": {}}
    with pytest.raises(LaunchError, match=r"(?s)no weight was changed.*mismatch/abs is .*stages.0.mismatch.stop"):
        train(load(_write(tmp_path, config)))
    records = read_metrics(tmp_path / "stopped/metrics.jsonl").records
    assert not [r for r in records if "update" in r] and not (tmp_path / "stopped/hf").exists()


def _of_the_clock(name: str) -> bool:
    return name in ("time", "tokens_per_s") or name.startswith("time/")


def _outcome(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Metrics without what a clock said, and hashes of the exported files."""
    records = [
        {name: value for name, value in record.items() if not _of_the_clock(name)}
        for record in read_metrics(run_dir / "metrics.jsonl").records
    ]
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((run_dir / "hf").iterdir())}
    return records, hashes


def test_two_runs_of_a_deterministic_config_are_the_same_to_the_bit(files: Path, tmp_path: Path) -> None:
    """With evaluations between the steps, sampled tokens, a teacher, two updates a batch, a correction that acts."""
    outcomes = []
    for name in ("first", "second"):
        config = _config(files, tmp_path / name)
        config["rollout"] = {"deterministic": True}
        config["engines"]["rollout"]["chunked_prefill"] = 256
        config["stages"] = [config["stages"][1] | {"steps": 2}]
        config["stages"][0]["objective"]["correction"] = {"kind": "truncated", "cap": 1.0}
        config["evaluation"]["every"] = 1
        assert train(load(_write(tmp_path, config))) == 0
        outcomes.append(_outcome(tmp_path / name))
    first, second = outcomes
    updates = [r for r in first[0] if "update" in r]
    assert len(updates) == 4 and "model.safetensors" in first[1]
    assert all(0 < r["correction/tokens"] < 1 for r in updates)
    assert first == second

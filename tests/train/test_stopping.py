"""Figures that end a stage: what meets a condition, which names are refused, and runs that a figure ends."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dgrpo.checkpoint.manifest import checkpoints
from megatron_dgrpo.config.endings import StopWhen
from megatron_dgrpo.config.loader import load
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.events import read_events
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.train.stopping import Stopping


def test_a_condition_is_met_in_a_row_or_not_at_all() -> None:
    stopping = Stopping([StopWhen(metric="heldout/reward", above=0.9, in_a_row=2), StopWhen(metric="loss", below=0.1)])
    nan = float("nan")
    records = [
        {"heldout/reward": 0.95},
        {"loss": 0.1},
        {"heldout/reward": 0.9},
        {"heldout/reward": 0.91},
        {"loss": nan},
    ]
    for record in records:
        stopping.observe(record)
        assert not stopping.over and stopping.reason == ""
    assert stopping.unseen == ""
    again = Stopping([StopWhen(metric="heldout/reward", above=0.9, in_a_row=2), StopWhen(metric="loss", below=0.1)])
    again.restore(stopping.state())
    for one in (stopping, again):
        one.observe({"other": 1.0})
        one.observe({"heldout/reward": 0.92})
        assert one.over and one.reason == "heldout/reward is 0.92, above 0.9, 2 times in a row"
    low = Stopping([StopWhen(metric="loss", below=0.1), StopWhen(metric="lr", above=1)])
    assert low.unseen == "loss, lr"
    low.observe({"loss": 0.05})
    assert low.reason == "loss is 0.05, below 0.1" and low.unseen == "lr"


def test_what_was_met_stays_so_and_changed_conditions_begin_anew() -> None:
    first = StopWhen(metric="reward/mean", above=0.5, in_a_row=2)
    stopping = Stopping([first])
    for value in (0.6, 0.7, 0.1):
        stopping.observe({"reward/mean": value})
    assert stopping.reason == "reward/mean is 0.7, above 0.5, 2 times in a row"
    changed = Stopping([StopWhen(metric="reward/mean", above=0.99, in_a_row=2), first])
    changed.restore(stopping.state())
    assert changed.unseen == "reward/mean" and changed.reason == stopping.reason
    alone = Stopping([StopWhen(metric="loss", above=0.5, in_a_row=2)])
    alone.restore(stopping.state())
    assert not alone.over


def _config(files: Path, run_dir: Path, first: dict[str, Any], **more: Any) -> dict[str, Any]:
    sft = {"kind": "sft", "data": {"path": str(files / "task/train.jsonl")}, "batch_size": 4}
    return {
        "run_dir": str(run_dir),
        "models": {"student": {"path": str(files / "student"), "dtype": "float32"}},
        "student": "student",
        "checkpoints": {"every": 1, "keep_last": 10},
        "stages": [
            sft | {"steps": 40, "optimizer": {"lr": 1e-3, "warmup_steps": 2}} | first,
            sft | {"steps": 2, "optimizer": {"lr": 1e-3}},
        ],
    } | more


def _run(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures, without what a clock said."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert train(load(path)) == 0
    records = read_metrics(Path(config["run_dir"]) / "metrics.jsonl").records
    clock = ("time", "time/", "tokens_per_s")
    return [{k: v for k, v in r.items() if k != "time" and not k.startswith(clock[1:])} for r in records]


def _hash(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "hf/model.safetensors").read_bytes()).hexdigest()


def _said(run_dir: Path, kind: str) -> list[str]:
    return [event["words"] for event in read_events(run_dir / "events.jsonl").records if event["kind"] == kind]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_stage_that_a_figure_ends_ends_there_again_after_each_of_its_checkpoints(files: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    stop_when = {"metric": "loss", "below": 100, "in_a_row": 3}
    figures = _run(tmp_path, _config(files, run_dir, {"stop_when": stop_when}))
    assert [(r["stage_number"], r["step"]) for r in figures] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    (words,) = _said(run_dir, "stage over")
    assert words.startswith("stage 0 (sft) is over after step 3 of 40: loss is ")
    assert words.endswith(", below 100, 3 times in a row")
    names = [folder.name for folder in checkpoints(run_dir)]
    assert {"00-000002", "00-000003"} <= set(names)
    for name in ("00-000002", "00-000003"):  # in the middle of the count; after the end
        again = tmp_path / name
        shutil.copytree(run_dir, again)
        shutil.rmtree(again / "hf")
        for folder in checkpoints(again):
            if folder.name > name:
                shutil.rmtree(folder)
        assert _run(tmp_path, _config(files, again, {"stop_when": stop_when})) == figures
        assert _hash(again) == _hash(run_dir)
        assert f"goes on from checkpoint {name}" in _said(again, "resume")


@pytest.mark.timeout(600)
def test_an_evaluation_ends_a_stage_before_its_first_step_and_a_last_one_is_made(files: Path, tmp_path: Path) -> None:
    """The first stage needs one evaluation, the second two and ends between two that are due."""
    evaluation = {
        "data": {"path": str(files / "task/heldout.jsonl")},
        "engine": "rollout",
        "num_prompts": 4,
        "sampling": {"max_tokens": 2},
        "rewards": [{"kind": "exact_match"}],
        "every": 0,
    }
    engines = {"rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26}}
    config = _config(
        files,
        tmp_path / "run",
        {"stop_when": [{"metric": "heldout/score/exact_match", "above": -1}]},
        evaluation=evaluation,
        engines=engines,
    )
    config["stages"][1] |= {"steps": 9, "stop_when": [{"metric": "grad_norm", "above": 0, "in_a_row": 2}]}
    figures = _run(tmp_path, config)
    at = [(r["stage_number"], r["step"], "heldout/reward" in r) for r in figures]
    assert at == [(0, 0, True), (1, 0, True), (1, 1, False), (1, 2, False), (1, 2, True)]


@pytest.mark.timeout(600)
def test_a_run_whose_weights_overflow_skips_all_later_updates_and_says_so(files: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = {"optimizer": {"lr": 1e36}, "steps": 4, "on_nonfinite": {"kind": "skip", "in_a_row": 4}}
    config = _config(files, run_dir, first)
    config["stages"] = config["stages"][:1]
    figures = _run(tmp_path, config)
    assert [r["skipped_steps"] for r in figures] == [0.0, 1.0, 2.0, 3.0]
    assert ["grad_norm" in r for r in figures] == [True, False, False, False]
    said = _said(run_dir, "skipped_steps")
    assert len(said) == 3 and all("; no weight was changed:" in words for words in said)
    assert said[-1].startswith("stage 0 (sft), step 4, update 1: ") and "sample 0 of prompt train" in said[-1]

"""A run that was killed, interrupted or damaged goes on as if nothing had been; what it must not go on with is refused.

Every run here is a real one: ranks at TP2, a vLLM engine, a teacher, weight transfers, checkpoints at every step.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from megatron_dgrpo.checkpoint.manifest import checkpoints, verify
from megatron_dgrpo.observe.events import read_events
from megatron_dgrpo.observe.metrics import read_metrics

pytestmark = pytest.mark.timeout(900)

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
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_dgrpo.cli", "train", str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _STARTED.append(process)
    return process


_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    """What a test that fails has started ends with it."""
    yield
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def _ends(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=800)
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


@pytest.mark.long
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


def _family(process: subprocess.Popen[str]) -> set[int]:
    pending, found = [process.pid], set[int]()
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            pending += map(int, task.read_text().split())
        found |= set(pending)
    return found


def _engine_of(process: subprocess.Popen[str]) -> int:
    """The engine host below a supervisor."""
    (engine,) = [pid for pid in _family(process) if Path(f"/proc/{pid}/comm").read_text().strip() == "engine-rollout"]
    return engine


@pytest.mark.long
def test_a_run_that_is_told_to_end_in_a_batch_and_whose_checkpoint_is_damaged(
    files: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = _config(files, run_dir, checkpoints={"every": 0})
    first = _start(tmp_path, config)
    _wait(first, (run_dir / "logs/rank0.log").exists, "no rank")
    _, refused = _ends(_start(tmp_path, config), 1)
    assert f"is in use: process {first.pid} on" in refused

    _wait(first, _wrote(run_dir, '"stage_number": 1, "step": 1, "update": 1'), "no first step")
    first.send_signal(signal.SIGUSR1)
    _wait(first, (run_dir / "rollouts/01-000003.rollouts").exists, "no third step")
    os.kill(_engine_of(first), signal.SIGSTOP)  # it never answers
    first.send_signal(signal.SIGTERM)
    _ends(first, 128 + signal.SIGTERM)
    newest, older = checkpoints(run_dir)
    assert newest.name in ("01-000002", "01-000003") and verify(newest) == [], "the last step is saved"
    assert older.name in ("01-000001", "01-000002") and verify(older) == [], "what SIGUSR1 asked for"
    assert len(_said(run_dir, "interrupted")) == len(_said(run_dir, "end early")) == 1

    _, refused = _ends(_start(tmp_path, config, f"models.teacher.path={files / 'student'}"), 2)
    assert "- models.teacher.path\n" in refused and "resume.allow=[models.teacher.path]" in refused
    _, refused = _ends(_start(tmp_path, config, "stages.0.steps=1", "seed=3"), 2)
    assert "resume.allow=[seed, stages.0]" in refused

    (weights, *_) = sorted((newest / "weights").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    _ends(_start(tmp_path, config))
    _same(run_dir, unbroken)
    told = _said(run_dir, "resume")
    assert any(
        f"{newest.name} is not whole" in words and f"weights/{weights.name}: its contents" in words for words in told
    )
    assert f"goes on from checkpoint {older.name}" in told
    assert newest.with_name(f"{newest.name}.damaged").is_dir()


@pytest.mark.long
def test_at_another_layout_the_next_step_has_the_same_loss_on_the_same_trajectories(
    files: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "hf")
    shutil.rmtree(run_dir / "checkpoints/01-000004")
    config = _config(files, run_dir)
    for model in config["models"].values():
        model["layout"] = {"dp": 2}
    _ends(_start(tmp_path, config))
    ours, theirs = (
        next(r for r in _figures(folder) if (r["stage_number"], r["step"], r.get("update")) == (*LAST, 1))
        for folder in (run_dir, unbroken)
    )
    assert ours.keys() == theirs.keys()
    exact = [name for name in theirs if name.startswith(("reward/", "response/", "tokens", "groups"))]
    assert "reward/mean" in exact and all(ours[name] == theirs[name] for name in exact), "the same trajectories"
    figures = [
        name for name in theirs if name.startswith(("loss", "surrogate/", "teacher_kl/", "grad_norm", "entropy"))
    ]
    assert {"grad_norm", "teacher_kl/kl", "surrogate/ratio"} <= set(figures), sorted(theirs)
    for name in figures:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name


# ---- SFT alone: no engine ----


def _sft(files: Path, run_dir: Path, **checkpoints: Any) -> dict[str, Any]:
    config = _config(files, run_dir, checkpoints=checkpoints)
    config["stages"] = [config["stages"][0] | {"steps": 100_000}]
    config["models"] = {"student": config["models"]["student"] | {"layout": {}}}
    return config | {"teachers": [], "engines": {}, "evaluation": None}


def test_a_disk_that_takes_no_checkpoint_stops_saving_and_not_training(files: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = _start(tmp_path, _sft(files, run_dir, every=3))
    _wait(process, (run_dir / "config.yaml").exists, "no run folder")
    (run_dir / "checkpoints").write_text("in the way")
    _wait(process, _wrote(run_dir, '"step": 20'), "training ended")
    process.send_signal(signal.SIGINT)
    _ends(process, 130)
    assert len(_said(run_dir, "checkpoint")) >= 3
    assert all("no checkpoint was written, training goes on" in words for words in _said(run_dir, "checkpoint"))


def test_a_run_saves_and_ends_before_its_time_limit_and_a_rank_that_hangs_does_not_hold_it(
    files: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    limit = {"every": 0, "time_limit_s": 3600}
    for seconds in (20, 60, 180):  # on a machine that is busy it may have come to nothing before
        _ends(_start(tmp_path, _sft(files, run_dir, **limit, margin_s=3600 - seconds)), 75)
        if checkpoints(run_dir):
            break
    (first,) = checkpoints(run_dir)
    assert verify(first) == [] and "ended before its time limit" in _said(run_dir, "interrupted")
    process = _start(tmp_path, _sft(files, run_dir, **limit, grace_s=1000))
    seen = len(_figures(run_dir))
    _wait(process, lambda: len(_figures(run_dir)) > seen, "it does not go on")
    figures = _figures(run_dir)
    assert [record["step"] for record in figures] == list(range(1, len(figures) + 1))
    (rank,) = [pid for pid in _family(process) if Path(f"/proc/{pid}/comm").read_text().strip() == "rank0"]
    os.kill(rank, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)  # not to wait for it
    _ends(process, 130)
    assert checkpoints(run_dir) == [first]

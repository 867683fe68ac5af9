"""`dgrpo train` whose ranks or supervisor are killed or stop: it ends within its deadline, and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_loop import _alive, _descendants, _named, _wait

from megatron_dgrpo.observe.events import read_events
from megatron_dgrpo.observe.metrics import read_metrics

Run = tuple[subprocess.Popen[str], Path, set[int]]


def _config(files: Path, run_dir: Path, dp: int, **changes: Any) -> dict[str, Any]:
    """SFT without end."""
    stage = {"kind": "sft", "data": {"path": str(files / "task/train.jsonl")}, "steps": 100_000, "batch_size": 8}
    model = {"path": str(files / "student"), "dtype": "float32", "layout": {"dp": dp}}
    return {
        "run_dir": str(run_dir),
        "models": {"student": model},
        "student": "student",
        "checkpoints": {"every": 0, "grace_s": 1},
        "stages": [stage | {"optimizer": {"lr": 1e-3}}],
    } | changes


def _steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(read_metrics(path).records) if path.exists() else 0


@pytest.fixture
def start(files: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """A run in the middle of its steps, and all its processes."""
    started: list[Run] = []

    def begin(dp: int = 1, **changes: Any) -> Run:
        path, run_dir = tmp_path / "config.yaml", tmp_path / "run"
        path.write_text(yaml.safe_dump(_config(files, run_dir, dp, **changes)))
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dgrpo.cli", "train", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append((process, run_dir, set()))
        _wait(lambda: process.poll() is not None or _steps(run_dir) >= 3, 200, "no step")
        assert process.poll() is None, process.communicate()
        started[-1][2].update(_descendants(process.pid))
        return started[-1]

    yield begin
    for process, _, family in started:
        for pid in _alive(family | {process.pid}):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def _ends(run: Run, within_s: float) -> str:
    """What it says at its end, after which nothing is left."""
    process, run_dir, family = run
    _, said = process.communicate(timeout=within_s)
    assert process.returncode == 1, said
    _wait(lambda: not _alive(family), 60, f"processes are left: {_alive(family)}")
    assert not list(Path("/dev/shm").glob("dgrpo-*"))
    (last,) = [event for event in read_events(run_dir / "events.jsonl").records if event["kind"] == "failure"]
    assert last["words"] in said
    return said


def _rank(run: Run, number: int) -> int:
    (pid,) = _named(run[2], f"rank{number}")
    return pid


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_is_killed_ends_the_run_with_its_name(start: Callable[..., Run], number: int) -> None:
    run = start(dp=2)
    os.kill(_rank(run, number), signal.SIGKILL)
    said = _ends(run, 100)
    assert f"rank{number} (trainer rank, pid {_rank_pid(said)}) was killed by SIGKILL" in said
    assert "see `dmesg` for the kernel's out-of-memory killer" in said and "Its last words" in said


def _rank_pid(said: str) -> str:
    return said.partition("pid ")[2].partition(")")[0]


@pytest.mark.long
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_hangs_ends_the_run_when_the_others_have_waited(start: Callable[..., Run], number: int) -> None:
    """Or, where they asked rank 0 for something in the store that it keeps, when it shows no sign of life."""
    run = start(dp=2, collective_timeout_s=10, stall_timeout_s=60)
    os.kill(_rank(run, number), signal.SIGSTOP)
    said = _ends(run, 250)
    waited = f"rank{1 - number} (trainer rank, pid " in said and "exited with status 1; the run is stopped" in said
    assert waited or (number == 0 and "rank0 has shown no sign of life for 60 s" in said), said


@pytest.mark.long
def test_a_rank_that_hangs_alone_ends_the_run_when_it_shows_no_sign_of_life(start: Callable[..., Run]) -> None:
    run = start(stall_timeout_s=20)
    os.kill(_rank(run, 0), signal.SIGSTOP)
    assert "rank0 has shown no sign of life for 20 s (stall_timeout_s): it hangs" in _ends(run, 200)


@pytest.mark.long
def test_a_supervisor_that_is_stopped_for_a_while_holds_no_step_up(start: Callable[..., Run]) -> None:
    run = start()
    process, run_dir, family = run
    process.send_signal(signal.SIGSTOP)
    before = _steps(run_dir)
    _wait(lambda: _steps(run_dir) >= before + 3, 100, "no step without the supervisor")
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 130
    _wait(lambda: not _alive(family), 60, "processes are left")

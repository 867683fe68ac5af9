"""Disks that are full or cannot be written: saving stops, and training does not; what cannot begin says so at once."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dgrpo.checkpoint.manifest import checkpoints, verify
from megatron_dgrpo.observe.events import read_events
from megatron_dgrpo.observe.metrics import read_metrics


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"file systems can't be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


class Filler:
    """Takes all the room that there is, also what comes free meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path, self._stop = path, threading.Event()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT)
        self.fill()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def fill(self) -> None:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    os.write(self._file, b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.fill()

    def remove(self) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._file)
        self._path.unlink()


def _config(files: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    stage = {"kind": "sft", "data": {"path": str(files / "task/train.jsonl")}, "steps": 100_000, "batch_size": 8}
    return {
        "run_dir": str(run_dir),
        "models": {"student": {"path": str(files / "student"), "dtype": "float32"}},
        "student": "student",
        "checkpoints": {"every": 3},
        "stages": [stage | {"optimizer": {"lr": 1e-3}}],
    } | changes


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], tuple[subprocess.Popen[bytes], Path]]]:
    started = []

    def begin(config: dict[str, Any]) -> tuple[subprocess.Popen[bytes], Path]:
        path, said = tmp_path / f"config{len(started)}.yaml", tmp_path / f"said{len(started)}"
        path.write_text(yaml.safe_dump(config))
        with said.open("wb") as out:
            command = [sys.executable, "-m", "megatron_dgrpo.cli", "train", str(path)]
            process = subprocess.Popen(
                command, stdout=out, stderr=out, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
            )
        started.append(process)
        return process, said

    yield begin
    for process in started:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], said: Path, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)


def test_a_disk_that_fills_up_stops_saving_and_not_training(files: Path, disk: Path, start: Any) -> None:
    """It is said where it can be seen, although the log is on the full disk; when there is room again, saves succeed,
    and no line of the steps in between is missing."""
    run_dir = disk / "run"
    process, said = start(_config(files, run_dir))
    _wait(process, said, lambda: checkpoints(run_dir))
    filler = Filler(disk / "filler")
    told = "warning: no checkpoint was written, training goes on: "
    _wait(process, said, lambda: said.read_text().count(told) >= 3)  # at three steps, one after the other
    assert "can't be written (No space left on device): figures and events wait in memory" in said.read_text()
    before = {path.name for path in checkpoints(run_dir)}
    assert before and all(verify(path) == [] for path in checkpoints(run_dir)), "what was saved stays"
    filler.remove()
    _wait(process, said, lambda: {path.name for path in checkpoints(run_dir)} - before)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, said.read_text()
    newest = checkpoints(run_dir)[0]
    assert verify(newest) == []
    steps = read_metrics(run_dir / "metrics.jsonl").series("step")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == int(newest.name.partition("-")[2])
    events = read_events(run_dir / "events.jsonl")
    words = [event["words"] for event in events.records]
    assert events.damaged == 0 and sum("no checkpoint was written" in one for one in words) >= 3
    assert "there is room again: figures and events that waited are written" in words
    assert [event["kind"] for event in events.records][-2:] == ["end early", "interrupted"]


def test_a_folder_on_a_full_disk_or_one_that_cannot_be_written_is_refused_at_once(
    files: Path, disk: Path, start: Any
) -> None:
    (disk / "used").mkdir()
    for name in ("config.yaml", "environment.json"):
        (disk / "used" / name).write_text("of an earlier run")
    filler = Filler(disk / "filler")
    try:
        for name in ("new", "used"):
            process, said = start(_config(files, disk / name))
            assert process.wait(120) == 2, said.read_text()
            full = f"the disk of {disk / name} is full (0 of " in said.read_text()
            assert full or "can't be written (No space left on device)" in said.read_text(), said.read_text()
            assert "Traceback" not in said.read_text()
    finally:
        filler.remove()
    assert (disk / "used/config.yaml").read_text() == "of an earlier run"
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name, words in (("other", "can't be made"), ("used", "cannot be written to")):
        process, said = start(_config(files, disk / name))
        assert process.wait(120) == 2 and "run_dir: " in said.read_text(), said.read_text()
        assert words in said.read_text() or "cannot be made" in said.read_text(), said.read_text()
        assert "Traceback" not in said.read_text()


# ---- without a file system of its own ----


@pytest.fixture
def no_room(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Files of this process can't grow beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if size >= 0 else limits[0], limits[1]))

    yield limit
    limit(-1)


def test_lines_wait_for_room_in_their_order_and_are_told_of_once(
    tmp_path: Path, no_room: Callable[[int], None]
) -> None:
    import io

    from megatron_dgrpo.observe.console import Console
    from megatron_dgrpo.observe.records import Records

    stream = io.StringIO()
    records = Records(tmp_path, Console(stream))
    for step in (1, 2):
        records.report("sft", 0, step, 9, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert records.positions()["metrics"] == size
    no_room(size + 10)
    for step in (3, 4, 5):
        records.report("sft", 0, step, 9, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").stat().st_size == size, "whole lines only"
    places = records.positions()["metrics"]
    assert places > 2 * size
    assert stream.getvalue().count("figures and events wait in memory") == 1
    no_room(-1)
    records.report("sft", 0, 6, 9, {"loss": 1.0})
    records.close()
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found.series("step") == [1, 2, 3, 4, 5, 6] and not found.torn
    ends = [len(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)]
    assert sum(ends[:5]) == places, "a checkpoint of then goes on after the fifth"
    assert stream.getvalue().count("there is room again") == 1


def test_what_waits_is_bounded_and_what_is_lost_is_counted(
    tmp_path: Path, no_room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_dgrpo.observe import metrics

    monkeypatch.setattr(metrics, "MOST_WAITING", 3)
    writer = metrics.MetricsWriter(tmp_path / "metrics.jsonl")
    no_room(5)
    for step in range(5):
        writer.write({"step": step})
    assert writer.num_lost == 2 and writer.failure == "File too large"
    no_room(-1)
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl").series("step") == [2, 3, 4]


def test_a_stream_that_takes_nothing_ends_no_run() -> None:
    from megatron_dgrpo.observe.console import Console

    full = open("/dev/full", "w")
    console = Console(full)
    console.step("sft", 1, 2, {"loss": 1.0})
    assert not console.note("words")
    with open(os.devnull, "w") as null:  # there is room again
        os.dup2(null.fileno(), full.fileno())
    assert console.note("words")
    full.close()

"""Clocks that go backwards: what is kept, when something is late and how long the rest takes do not depend on them."""

from __future__ import annotations

import ast
import itertools
import os
import time
from pathlib import Path

import pytest

import megatron_dgrpo
from megatron_dgrpo.checkpoint.manifest import MANIFEST, Manifest, checkpoints, folder_name
from megatron_dgrpo.checkpoint.pruning import prune
from megatron_dgrpo.cli import main
from megatron_dgrpo.observe.events import EventLog, read_events
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.observe.pace import Pace
from megatron_dgrpo.observe.progress import Board, read_board
from megatron_dgrpo.observe.records import Records
from megatron_dgrpo.observe.report.history import read_history

HOUR = 3600.0


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it an hour earlier."""
    hours = itertools.count()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - HOUR * next(hours))


def test_the_time_of_the_day_labels_and_decides_nothing() -> None:
    """These may ask for it: lines of records and events, and what shows them; and ages of checkpoints in a table. A
    deadline, an order or a lock that asked for it would be wrong after a clock was set."""
    labels = {
        "checkpoint/listing.py", "observe/environment.py", "observe/events.py", "observe/records.py",
        "observe/report/overview.py", "observe/report/page.py", "observe/tensorboard.py", "observe/trackers.py",
    }  # fmt: skip
    package = Path(megatron_dgrpo.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("time", "st_mtime", "st_ctime", "now", "utcnow"):
                if node.attr.startswith("st_") or ast.unparse(node.value) in ("time", "datetime", "datetime.datetime"):
                    found.add(str(path.relative_to(package)))
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert "time" not in {name.name for name in node.names}, path
    assert found == labels


def test_the_newest_checkpoint_is_that_of_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    for age, (stage, step) in enumerate([(0, 9), (0, 10), (1, 1), (1, 2)]):
        folder = tmp_path / "checkpoints" / folder_name(stage, step)
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_bytes(Manifest(stage, step, {}, {}).encode())
        os.utime(folder, times=(now - HOUR * age, now - HOUR * age))  # later ones look older
    os.utime(tmp_path / "checkpoints/01-000002", times=(now + 9e6, now + 9e6))  # or are from the future
    assert [path.name for path in checkpoints(tmp_path)] == ["01-000002", "01-000001", "00-000010", "00-000009"]
    assert [path.name for path in prune(tmp_path, keep_last=2, keep_best=0)] == ["00-000010", "00-000009"]
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert "-" not in [line.split()[4] for line in capsys.readouterr().out.splitlines()[1:]], "no negative age"


def test_steps_stay_in_their_order_and_the_rest_is_foretold(tmp_path: Path, backwards: None) -> None:
    records, log = Records(tmp_path), EventLog(tmp_path)
    for step in range(1, 6):
        records.begin("sft", 0, step, 9)
        records.report("sft", 0, step, 9, {"loss": float(step)})
        log.write("note", f"step {step}")
    records.close()
    times = read_metrics(tmp_path / "metrics.jsonl").series("time")
    assert times == sorted(times, reverse=True) and times[0] - times[-1] >= 4 * HOUR
    assert [r["step"] for r in read_history(tmp_path / "metrics.jsonl", [("sft", 9)]).records] == [1, 2, 3, 4, 5]
    assert [e["words"] for e in read_events(tmp_path / "events.jsonl").records] == [f"step {i}" for i in range(1, 6)]


def test_what_is_left_is_never_negative() -> None:
    pace = Pace()
    clock = 1000.0
    for step in range(1, 11):
        clock += 2.0 - (HOUR if step in (4, 8) else 0.0)
        pace.observe({"stage_number": 0, "step": step, "time": clock})
        assert step < 2 or 0 < (pace.left_s(20) or 0) <= 2.0 * (20 - step)
    for step in range(11, 41):
        clock += 2.0
        pace.observe({"stage_number": 0, "step": step, "time": clock})
    assert pace.left_s(100) == pytest.approx(60 * 2.0)


def test_a_board_says_how_long_it_has_been(tmp_path: Path, backwards: None) -> None:
    board, before = Board(tmp_path / "board"), time.monotonic()
    with board.task("load", 10, "rows"):
        state = read_board(tmp_path / "board")
        assert state is not None and before <= state.began <= time.monotonic()

"""Records of steps that come again are taken out, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dgrpo.observe.cut import cut_events, cut_metrics
from megatron_dgrpo.observe.events import EventLog, read_events
from megatron_dgrpo.points.plan import AFTER, BEFORE, HALF, Fault
from megatron_dgrpo.testing.faults import plan


def test_metrics_are_cut_where_the_checkpoint_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert cut_metrics(tmp_path, 0) == 0, "there is none yet"
    lines = [json.dumps({"step": step}) + "\n" for step in range(4)]
    path.write_text("".join(lines) + '{"torn')
    position = sum(map(len, lines[:2]))
    size = path.stat().st_size
    assert cut_metrics(tmp_path, position) == size - position
    assert path.read_text() == "".join(lines[:2])
    assert (tmp_path / "metrics.removed.jsonl").read_text() == "".join(lines[2:]) + '{"torn\n'
    assert cut_metrics(tmp_path, position) == 0 and cut_metrics(tmp_path, position + 100) == 0


def test_of_events_only_those_of_later_steps_go(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("start", "one")
    log.write("drop", "before", stage_number=1, step=9)
    position = log.path.stat().st_size
    log.write("note", "of the step itself", stage_number=2, step=3)
    log.write("drop", "later step", stage_number=2, step=4)
    log.write("drop", "later stage", stage_number=3, step=1)
    log.write("failure", "it ended so")
    log.write("start", "two")
    with log.path.open("ab") as file:
        file.write(b'{"torn')
    assert cut_events(tmp_path, position, (2, 3)) > 0
    found = read_events(log.path)
    assert [event["words"] for event in found.records] == ["one", "before", "of the step itself", "it ended so", "two"]
    assert found.damaged == 1
    removed = read_events(tmp_path / "events.removed.jsonl").records
    assert [event["words"] for event in removed] == ["later step", "later stage"]


_CUT = "import sys; from megatron_dgrpo.observe.cut import cut_events; cut_events(sys.argv[1], 0, (0, 1))"


@pytest.mark.parametrize(
    ("point", "moment"),
    [
        ("removed.lines", HALF), ("removed.sync", AFTER), ("records.new", BEFORE), ("records.new", HALF),
        ("records.name", BEFORE), ("records.name", AFTER),
    ],
)  # fmt: skip
def test_events_that_stay_are_there_whenever_a_kill_comes(point: str, moment: str, tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("drop", "later step", stage_number=0, step=2)
    log.write("failure", "it ended so")
    env = {
        **os.environ,
        **plan(tmp_path / "plan", Fault(point, "kill", moment)),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    killed = subprocess.run([sys.executable, "-c", _CUT, str(tmp_path)], env=env, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert "it ended so" in [event["words"] for event in read_events(log.path).records]
    cut_events(tmp_path, 0, (0, 1))
    assert [event["words"] for event in read_events(log.path).records] == ["it ended so"]
    assert "later step" in (tmp_path / "events.removed.jsonl").read_text()


def test_what_a_kill_cut_short_beside_damages_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    beside = tmp_path / "metrics.removed.jsonl"
    beside.write_bytes(b'{"step": 2')
    assert cut_metrics(tmp_path, len(b'{"step": 1}\n')) > 0
    assert beside.read_bytes() == b'{"step": 2\n{"step": 2}\n' and path.read_bytes() == b'{"step": 1}\n'

"""Records of steps that come again are taken out, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_dgrpo.observe.cut import cut_events, cut_metrics
from megatron_dgrpo.observe.events import EventLog, read_events


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

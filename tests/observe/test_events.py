from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.observe.events import EventLog, read_events, run_events


def test_what_is_written_is_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run")
    log.write("drop", "2 rows\nof é", level="warning", stage="dgrpo", step=3)
    log.write("note", "x")
    first, second = read_events(log.path).records
    assert {
        "kind": "drop",
        "words": "2 rows\nof é",
        "level": "warning",
        "stage": "dgrpo",
        "step": 3,
    }.items() <= first.items()
    assert abs(first["time"] - time.time()) < 60 and second["level"] == "info"
    assert read_events(tmp_path / "none").records == []


def test_a_line_that_was_cut_short_costs_no_other(tmp_path: Path) -> None:
    """Another process goes on after one that was killed inside a write."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b", "wor')
    EventLog(tmp_path).write("c", "after it")
    found = read_events(path)
    assert [r["kind"] for r in found.records] == ["a", "c"] and found.damaged == 1
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n[1]\n")
    assert [r["kind"] for r in read_events(path).records] == ["a", "c"] and read_events(path).damaged == 3


@pytest.mark.parametrize(
    ("error", "kind", "level", "words"),
    [
        (LaunchError("rank1 was killed"), "failure", "error", "rank1 was killed"),
        (ZeroDivisionError("no"), "failure", "error", "ZeroDivisionError: no"),
        (KeyboardInterrupt(), "interrupted", "warning", "interrupted by Ctrl-C"),
        (SystemExit(143), "interrupted", "warning", "ended by a signal (exit status 143)"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, error: BaseException, kind: str, level: str, words: str) -> None:
    with pytest.raises(type(error)), run_events(tmp_path):
        raise error
    begun, ended = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert begun["kind"] == "start"
    assert (ended["kind"], ended["level"], ended["words"]) == (kind, level, words)


def test_a_run_that_ended_well(tmp_path: Path) -> None:
    with run_events(tmp_path):
        pass
    assert [r["kind"] for r in read_events(tmp_path / "events.jsonl").records] == ["start", "end"]


def test_threads_write_at_one_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path)

    def write(name: str) -> None:
        for number in range(200):
            log.write("note", f"{name} {number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = read_events(tmp_path / "events.jsonl")
    assert found.damaged == 0
    assert sorted(event["words"] for event in found.records) == sorted(f"{n} {i}" for n in "abc" for i in range(200))

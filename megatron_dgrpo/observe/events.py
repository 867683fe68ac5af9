"""events.jsonl: what happened in a run beside its figures: its start and end, warnings, what was dropped, failures.

Two processes write it, rank 0 and the supervisor, a line at a time with O_APPEND. Either may be killed inside a write:
a writer begins a new line where the last one is unfinished, and the reader counts lines that it cannot read. Nothing
that was written before is lost to a line that is damaged. What a full disk does not take waits in the writer's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_dgrpo import points
from megatron_dgrpo.errors import DGRPOError

FILE = "events.jsonl"
_ENDED_EARLY = 75
"""Exit status of a run whose time was up."""
Level = Literal["info", "warning", "error"]


class EventLog:
    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self._waiting: list[bytes] = []
        self._lock = threading.RLock()  # again: a signal may come with words of its own
        self.failure = ""
        """Why events wait; empty while none does."""

    def write(self, kind: str, words: str, *, level: Level = "info", **where: str | int | float) -> None:
        """One event. `where` says at which stage and step."""
        record = {"time": time.time(), "level": level, "kind": kind, **where, "words": words}
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            self._waiting.append(line)
            self.flush()

    def flush(self) -> None:
        """Write what waits, as far as there is room."""
        with self._lock:
            self.failure = ""
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                while self._waiting:
                    self._append(self._waiting[0])
                    del self._waiting[0]
            except OSError as error:
                self.failure = error.strerror or str(error)

    def _append(self, line: bytes) -> None:
        file = points.open_file("events.open", self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            points.write("events.line", file, b"\n" * torn + line)
        finally:
            os.close(file)


@dataclass(frozen=True)
class Events:
    records: list[dict[str, Any]]
    damaged: int
    """Lines that could not be read."""


def read_events(path: str | Path) -> Events:
    """All events; none where the file does not exist."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return Events([], 0)
    records, damaged = [], 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError
            records.append(record)
        except ValueError:  # of decoding, too
            damaged += 1
    return Events(records, damaged)


@contextlib.contextmanager
def run_events(folder: str | Path) -> Iterator[EventLog]:
    """The start of a run and how it ended; what it ended with goes on its way."""
    log = EventLog(folder)
    log.write("start", f"started by process {os.getpid()}")
    try:
        yield log
    except BaseException as error:
        log.write(*_ending(error), level="error" if isinstance(error, Exception) else "warning")
        raise
    log.write("end", "ended well")


def _ending(error: BaseException) -> tuple[str, str]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "interrupted by Ctrl-C"
    if isinstance(error, SystemExit) and error.code == _ENDED_EARLY:
        return "interrupted", "ended before its time limit"
    if isinstance(error, SystemExit):
        return "interrupted", f"ended by a signal (exit status {error.code})"
    return "failure", str(error) if isinstance(error, DGRPOError) else f"{type(error).__name__}: {error}"

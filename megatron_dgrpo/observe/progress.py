"""How far something long is: a process writes it on its board, the supervisor, who has the terminal, shows it.

A board is a small file that the supervisor names in the environment of each process that it starts (DGRPO_PROGRESS). It
is written in place, since renaming a file over another waits for the disk, and at most a few times a second; a checksum
tells a state of which only a part has been written. A process without a board (a test, a tool) writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

VARIABLE = "DGRPO_PROGRESS"
_SECONDS_BETWEEN_WRITES = 0.2
_SIZE = 2048
"""Bytes of a board: a shorter state is filled up, so that nothing of a longer one stays."""


@dataclass(frozen=True)
class State:
    """Of one process's board."""

    what: str = ""
    """What is being done; empty: nothing that would be long."""
    done: float = 0
    total: float = 0
    """0 where it is not known."""
    unit: str = ""
    began: float = 0.0
    """time.monotonic() of its start, which all processes of a machine share."""
    stage: str = ""
    stage_number: int = 0
    step: int = 0
    """The step that is under way; 0 before the first."""
    steps: int = 0
    notice: str = ""
    """What could be said nowhere else."""
    notices: int = 0


class Board:
    def __init__(self, path: str | Path | None = None) -> None:
        path = path or os.environ.get(VARIABLE)
        self._path = Path(path) if path else None
        self._state = State()
        self._file: FileIO | None = None
        self._written_at = 0.0
        self._done = 0.0

    def step(self, stage: str, number: int, step: int, steps: int) -> None:
        """A step begins."""
        self._set(replace(self._state, done=self._done, stage=stage, stage_number=number, step=step, steps=steps))

    def say(self, words: str) -> None:
        """Where the log takes nothing."""
        notice = words.encode("ascii", "replace").decode()[:1000]
        self._set(replace(self._state, done=self._done, notice=notice, notices=self._state.notices + 1))

    @contextlib.contextmanager
    def task(self, what: str, total: float = 0, unit: str = "") -> Iterator[Task]:
        """Something long begins, and ends with the context; one inside another stands in its place meanwhile."""
        what = what if len(what) <= 100 else f"...{what[-97:]}"
        before = replace(self._state, done=self._done)
        task = Task(self)
        self._set(replace(before, what=what, done=0, total=total, unit=unit, began=time.monotonic()))
        try:
            yield task
        finally:
            at = self._state  # a step may have begun inside
            now = {key: getattr(at, key) for key in ("stage", "stage_number", "step", "steps", "notice", "notices")}
            self._set(replace(before, **now))

    def over[T](self, items: Iterable[T], what: str, total: float, unit: str = "") -> Iterator[T]:
        """The items, each counted when the next one is asked for."""
        with self.task(what, total, unit) as task:
            for item in items:
                yield item
                task.advance()

    def advance(self, amount: float) -> None:
        """Called for every sample, row or tensor: the file is written now and then."""
        self._done += amount
        if self._path is not None and time.monotonic() - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self._write()

    def _set(self, state: State) -> None:
        self._state, self._done = state, state.done
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._written_at = time.monotonic()
        text = json.dumps(vars(self._state) | {"done": self._done}).encode()
        content = b"%08x %s" % (zlib.crc32(text), text)
        with contextlib.suppress(OSError):  # the folder goes with the supervisor; to be unseen is no reason to fail
            if self._file is None:
                self._file = self._path.open("wb", buffering=0)
            os.pwrite(self._file.fileno(), content.ljust(_SIZE), 0)


class Task:
    def __init__(self, board: Board) -> None:
        self._board = board

    def advance(self, amount: float = 1) -> None:
        self._board.advance(amount)


def read_board(path: str | Path) -> State | None:
    """None where there is none yet, or only a part of a state."""
    try:
        checksum, _, text = Path(path).read_bytes().rstrip().partition(b" ")
        return State(**json.loads(text)) if checksum == b"%08x" % zlib.crc32(text) else None
    except (OSError, ValueError, TypeError):
        return None

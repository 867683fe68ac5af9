"""A run's records: each step goes to metrics.jsonl whole, to the console in short, and to the trackers.

What else happens goes to events.jsonl and to the console. A disk that is full stops none of it: lines wait in memory
until there is room, and that is told once each way. Rank 0's console is a log, on the same disk as a rule: what it does
not take is said on the board, which the supervisor shows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dgrpo.observe.console import Console
from megatron_dgrpo.observe.events import EventLog, Level
from megatron_dgrpo.observe.metrics import MetricsWriter
from megatron_dgrpo.observe.progress import Board
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.observe.trackers import Tracked, Tracker

_CONSOLE_S = 1.0
"""Steps that follow one another faster are in metrics.jsonl only; first and last ones and evaluations always show."""


class Records:
    """Of one process: rank 0's.

    `trackers` are made when they have something to say; `steps` are those of each stage, which places a step of a later
    stage after all of the earlier ones in a tracker's curves.
    """

    def __init__(
        self,
        folder: str | Path,
        console: Console | None = None,
        *,
        trackers: Sequence[tuple[str, Callable[[], Tracker]]] = (),
        steps: Sequence[int] = (),
    ) -> None:
        self._writer = MetricsWriter(Path(folder) / "metrics.jsonl")
        self._events = EventLog(folder)
        self._console = console or Console()
        self.board = Board()
        self._steps = steps
        self._where: dict[str, str | int] = {}
        self._shown_at = -math.inf
        self._waits = False  # for room on the disk
        self._tracked = [Tracked(name, make, self._tracker_failed) for name, make in trackers]
        if self._writer.torn_bytes:
            self.note(
                f"cut {self._writer.torn_bytes} bytes of an unfinished line off {self._writer.path}", level="warning"
            )

    def begin(self, stage: str, number: int, step: int, steps: int) -> None:
        """A step begins; what is noted from here on belongs to it."""
        self._where = {"stage": stage, "stage_number": number, "step": step}
        self.board.step(stage, number, step, steps)

    def report(
        self,
        stage: str,
        number: int,
        step: int,
        steps: int,
        values: Mapping[str, Any],
        *,
        phases: Phases | None = None,
        update: int | None = None,
    ) -> None:
        """What a step of a stage had to say. With its phases come its times and, where it has `tokens`, their rate."""
        record: dict[str, Any] = {"time": time.time(), "stage": stage, "stage_number": number, "step": step}
        if update is not None:
            record["update"] = update
        record |= values
        if phases is not None:
            elapsed = phases.elapsed
            record |= {f"time/{name}": seconds for name, seconds in phases.seconds.items()}
            record["time/step"] = elapsed
            if "tokens" in values and elapsed > 0:
                record["tokens_per_s"] = float(values["tokens"]) / elapsed
        self._writer.write(record)
        self._look_after_the_files()
        for tracked in self._tracked:
            tracked.log(sum(self._steps[:number]) + step, record)
        if step in (0, 1, steps) or "heldout/reward" in values or time.monotonic() - self._shown_at >= _CONSOLE_S:
            self._console.step(stage, step, steps, record)
            self._shown_at = time.monotonic()

    def note(self, words: str, *, kind: str = "note", level: Level = "info") -> None:
        """Something else than a figure."""
        self._events.write(kind, words, level=level, **self._where)
        shown = words if level == "info" or words.startswith(f"{level}:") else f"{level}: {words}"
        if not self._console.note(shown):
            self.board.say(shown)

    def _look_after_the_files(self) -> None:
        """Whether they take what is written, where that has changed."""
        if self._events.failure:
            self._events.flush()
        failure = self._writer.failure or self._events.failure
        if bool(failure) == self._waits:
            return
        self._waits = bool(failure)
        if failure:
            words = f"{self._writer.path.parent} can't be written ({failure}): figures and events wait in memory"
            self.note(f"{words}, and training goes on; free space there", kind="disk", level="warning")
        else:
            lost = f"; {self._writer.num_lost} of the oldest steps are lost" if self._writer.num_lost else ""
            self.note(f"there is room again: figures and events that waited are written{lost}", kind="disk")

    def _tracker_failed(self, words: str) -> None:
        """Called by a tracker's own thread."""
        self.note(words, kind="tracker", level="warning")

    def positions(self) -> dict[str, int]:
        """Where the files end."""
        events = self._events.path
        return {"metrics": self._writer.position, "events": events.stat().st_size if events.exists() else 0}

    def sync(self) -> None:
        """Before a checkpoint that names their places; a disk that does not do it takes no checkpoint, either."""
        with contextlib.suppress(OSError):
            self._writer.sync()

    def close(self) -> None:
        for tracked in self._tracked:
            tracked.close()
        self._writer.close()
        self._look_after_the_files()

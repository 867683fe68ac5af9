"""A run's records: each step goes to metrics.jsonl whole, to the console in short, and to the trackers.

What else happens goes to events.jsonl and to the console.
"""

from __future__ import annotations

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
        for tracked in self._tracked:
            tracked.log(sum(self._steps[:number]) + step, record)
        if step in (0, 1, steps) or "heldout/reward" in values or time.monotonic() - self._shown_at >= _CONSOLE_S:
            self._console.step(stage, step, steps, record)
            self._shown_at = time.monotonic()

    def note(self, words: str, *, kind: str = "note", level: Level = "info") -> None:
        """Something else than a figure."""
        self._events.write(kind, words, level=level, **self._where)
        self._console.note(words if level == "info" or words.startswith(f"{level}:") else f"{level}: {words}")

    def _tracker_failed(self, words: str) -> None:
        """Called by a tracker's own thread."""
        self.note(words, kind="tracker", level="warning")

    def positions(self) -> dict[str, int]:
        """Where the files end."""
        events = self._events.path
        return {"metrics": self._writer.position, "events": events.stat().st_size if events.exists() else 0}

    def sync(self) -> None:
        self._writer.sync()

    def close(self) -> None:
        for tracked in self._tracked:
            tracked.close()
        self._writer.close()

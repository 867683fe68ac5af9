"""A run's records: each step goes to metrics.jsonl whole and to the console in short."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dgrpo.observe.console import Console
from megatron_dgrpo.observe.metrics import MetricsWriter
from megatron_dgrpo.observe.timers import Phases

_CONSOLE_S = 1.0
"""Steps that follow one another faster are in metrics.jsonl only; first and last ones and evaluations always show."""


class Records:
    """Of one process: rank 0's."""

    def __init__(self, folder: str | Path, console: Console | None = None) -> None:
        self._writer = MetricsWriter(Path(folder) / "metrics.jsonl")
        self._console = console or Console()
        self._shown_at = -math.inf
        if self._writer.torn_bytes:
            self.note(f"cut {self._writer.torn_bytes} bytes of an unfinished line off {self._writer.path}")

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
        if step in (0, 1, steps) or "heldout/reward" in values or time.monotonic() - self._shown_at >= _CONSOLE_S:
            self._console.step(stage, step, steps, record)
            self._shown_at = time.monotonic()

    def note(self, words: str) -> None:
        """For whoever watches; not a metric."""
        self._console.note(words)

    def close(self) -> None:
        self._writer.close()

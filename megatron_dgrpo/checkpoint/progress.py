"""How far a conversion is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Use it as a context and call it with the bytes that were done. Without `shown` (other ranks) it is silent."""

    def __init__(self, what: str, total: int, *, shown: bool = True, stream: TextIO | None = None) -> None:
        self._what, self._total, self._stream, self._shown = what, max(1, total), stream or sys.stderr, shown
        self._done, self._start = 0, time.monotonic()
        self._last_line = self._start
        self._bar: Progress | None = None
        if shown and self._stream.isatty():
            columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task(what, total=self._total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._bar is not None:
            self._bar.advance(self._task, num_bytes)
        elif self._shown and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None:
            self._line()

    def _line(self) -> None:
        seconds = time.monotonic() - self._start
        rate = self._done / max(seconds, 1e-9) / 2**20
        part = f"{self._done / self._total:.0%} of {self._total / 2**30:.2f} GiB"
        print(f"{self._what}: {part} in {seconds:.1f} s ({rate:,.0f} MiB/s)", file=self._stream, flush=True)

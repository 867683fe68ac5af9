"""metrics.jsonl: one JSON object per line and step, readable while it grows and after a kill.

A line goes to the file in one write, and only a process that dies inside that write leaves a torn last line. A writer
that finds one cuts it off and says so; the reader leaves it out. A line that the disk has no room for waits in memory,
and those after it wait behind it: a full disk stops no training, and leaves no gap once there is room. JSON has no NaN
or infinity: they are written as the texts "NaN", "Infinity" and "-Infinity", which the reader turns back, so that a bad
number is seen and no bad file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgrpo import points
from megatron_dgrpo.errors import DataError

MOST_WAITING = 100_000
"""Lines that wait in memory for room on the disk; of more, the oldest are lost, and counted."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends to a file. Nothing is kept back, but from a full disk: else a line that was written is there for whoever
    reads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = points.open_file("metrics.open", self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.torn_bytes = self._cut_torn_line()
        """Bytes of an unfinished last line that were there before, and are gone."""
        self._waiting: deque[bytes] = deque()
        self.failure = ""
        """Why lines wait; empty while none does."""
        self.num_lost = 0

    def _cut_torn_line(self) -> int:
        size = os.fstat(self._file).st_size
        end = size
        while end > 0:
            start = max(0, end - 65536)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            points.cut("metrics.torn", self._file, end)
        return size - end

    def write(self, record: Mapping[str, Any]) -> None:
        """One line. Numbers of any library are taken that `float` takes."""
        line = json.dumps(
            {key: _plain(key, value) for key, value in record.items()}, allow_nan=False, ensure_ascii=False
        )
        self._waiting.append(line.encode("utf-8") + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as there is room."""
        self.failure = ""
        while self._waiting and not self.failure:
            size = os.fstat(self._file).st_size
            try:
                points.write("metrics.line", self._file, self._waiting[0])
                self._waiting.popleft()
            except OSError as error:
                with contextlib.suppress(OSError):
                    points.cut("metrics.undo", self._file, size)  # whole lines only
                self.failure = error.strerror or str(error)
        while len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.num_lost += 1

    @property
    def position(self) -> int:
        """Where the file ends, once what waits is written."""
        return os.fstat(self._file).st_size + sum(map(len, self._waiting))

    def sync(self) -> None:
        """What was written survives the machine."""
        self.flush()
        points.sync("metrics.sync", self._file)

    def close(self) -> None:
        self.flush()
        os.close(self._file)


def _plain(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metric {key} is a {type(value).__name__}: only numbers, text and None can be written"
        ) from error
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


@dataclass(frozen=True)
class Metrics:
    records: list[dict[str, Any]]
    torn: bool
    """Whether the file ends in an unfinished line, which is not among the records."""

    def series(self, key: str) -> list[Any]:
        """The values under a key, of the records that have it."""
        return [record[key] for record in self.records if key in record]


def read_metrics(path: str | Path) -> Metrics:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}): has the run begun?") from None
    *lines, last = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(
                f"line {number} of {path} is damaged ({error}): only the last line of a killed run may be"
            ) from None
        records.append({key: _NON_FINITE.get(v, v) if isinstance(v, str) else v for key, v in record.items()})
    return Metrics(records, torn=bool(last))

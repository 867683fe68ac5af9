"""A JSON-lines file, read by line without holding it in memory.

The first pass reads every line once, lists everything that is wrong with any of them, and keeps where each good line
lies. Later reads seek. A file that changes in between is refused rather than read at offsets that no longer hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dgrpo.config.data import Source
from megatron_dgrpo.data.bad_rows import BadRows
from megatron_dgrpo.data.patience import Patience
from megatron_dgrpo.data.rows import kind
from megatron_dgrpo.errors import DataError


class JsonLines:
    """Objects of a file by their index. `check` says what is wrong with one; those without a problem are kept, and what
    became of the others is in `bad`."""

    def __init__(
        self, path: str | Path, check: Callable[[dict[str, Any]], list[str]], patience: Patience | None = None
    ) -> None:
        self.path = Path(path)
        self._check, self.patience = check, patience or Patience(Source(path=str(path)))
        self.patience.without_deadline(self._index)

    def _index(self) -> None:
        with open(self.path, "rb") as file:
            self._identity = _identity(file)
        self.bad = BadRows(str(self.path), "line")
        numbers, starts, ends = list[int](), list[int](), list[int]()
        for number, start, line in self._scan():
            if wrong := self._problems(line):
                self.bad.add(number, wrong)
                continue
            numbers.append(number)
            starts.append(start)
            ends.append(start + len(line))
        self.bad.num_good = len(numbers)
        self.numbers = np.asarray(numbers, np.int64)
        """The line of each row, from 1."""
        self._starts, self._ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows and no row {index}")
        return self.patience(lambda: self._read(index))

    def _read(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            if self._identity != _identity(file):
                raise DataError(
                    f"{self.path} has changed since it was first read: start again, and keep it as it is during a run"
                )
            file.seek(int(self._starts[index]))
            return json.loads(file.read(int(self._ends[index] - self._starts[index])))

    def _scan(self) -> Iterator[tuple[int, int, bytes]]:
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, start, line
                start += len(line)

    def _problems(self, line: bytes) -> list[str]:
        """What is wrong with one line; nothing if it can be used."""
        if not line.strip():
            return ["is blank: remove it"]
        torn = "" if line.endswith(b"\n") else "; it is the last line and has no line end, so the file may be truncated"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return [f"is not UTF-8 (byte {error.start} of the line: {error.reason}){torn}"]
        except (json.JSONDecodeError, RecursionError) as error:
            where = (
                f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            )
            return [f"is not valid JSON ({where}){torn}"]
        if not isinstance(row, dict):
            return [f"is a JSON {kind(row)}, not an object"]
        return self._check(row)


def _identity(file: Any) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns

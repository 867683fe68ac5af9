"""A JSON-lines file, read by line without holding it in memory.

The first pass reads every line once, lists everything that is wrong with any of them, and keeps where each line starts.
Later reads seek. A file that changes in between is refused rather than read at offsets that no longer hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dgrpo.errors import DataError, listing

MAX_LISTED = 20
"""Bad rows that an error lists; the others are counted."""


class JsonLines:
    """Objects of a file by their index. Each must have the text fields asked for, and none of them empty."""

    def __init__(self, path: str | Path, text_fields: Sequence[str]) -> None:
        self.path = Path(path)
        self._text_fields = tuple(dict.fromkeys(text_fields))
        with self._open() as file:
            self._identity = _identity(file)
        offsets, problems, num_bad = [], [], 0
        for number, start, line in self._scan():
            offsets.append(start)
            wrong = self._problems(line)
            num_bad += bool(wrong)
            if wrong and num_bad <= MAX_LISTED:
                problems.append(f"line {number} {', '.join(wrong)}")
        if not offsets:
            raise DataError(f"{self.path} is empty: it needs one JSON object per line, with {self._wanted()}")
        if num_bad:
            title = f"{num_bad} of {len(offsets)} rows of {self.path} can't be used; a line is one JSON object with "
            title += f"{self._wanted()}:"
            more = [f"and {num_bad - MAX_LISTED} more"] if num_bad > MAX_LISTED else []
            raise DataError(listing(title, problems + more))
        self._offsets = np.asarray([*offsets, self._identity[0]], np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The object on line `index + 1`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows and no row {index}")
        with self._open() as file:
            if self._identity != _identity(file):
                raise DataError(
                    f"{self.path} has changed since it was first read: start again, and keep it as it is during a run"
                )
            file.seek(int(self._offsets[index]))
            return json.loads(file.read(int(self._offsets[index + 1] - self._offsets[index])))

    def _wanted(self) -> str:
        return f"text in the fields {', '.join(map(repr, self._text_fields))}"

    def _open(self) -> Any:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise DataError(f"{self.path} can't be read ({error.strerror}): correct the data's path") from None

    def _scan(self) -> Iterator[tuple[int, int, bytes]]:
        start = 0
        with self._open() as file:
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
            return [f"is a JSON {_kind(row)}, not an object"]
        return [wrong for name in self._text_fields if (wrong := _field_problem(row, name))]


def _identity(file: Any) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _field_problem(row: dict[str, Any], name: str) -> str | None:
    if name not in row:
        return f"has no field {name!r} (it has {', '.join(map(repr, row)) or 'none'})"
    value = row[name]
    if not isinstance(value, str):
        return f"has a {_kind(value)} in the field {name!r}, not text"
    if not value:
        return f"has nothing in the field {name!r}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"has half of a surrogate pair in the field {name!r}, which is no text"
    return None


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), "null")

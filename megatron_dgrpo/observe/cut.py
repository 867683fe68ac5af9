"""Records of steps that a run takes again are taken out of its files, and kept beside them.

A run that goes on from a checkpoint has metrics and events of steps after it. metrics.jsonl is cut at the byte where it
was when the checkpoint was taken; of events.jsonl, lines after that byte are taken out that belong to a later step:
that a run was started, interrupted or failed stays true. What is taken out is appended to *.removed.jsonl.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

Step = tuple[int, int]
"""Stage and step."""


def cut_metrics(folder: str | Path, position: int) -> int:
    """Returns the number of bytes that were taken out."""
    return _cut(Path(folder) / "metrics.jsonl", position, lambda line: False)


def cut_events(folder: str | Path, position: int, last: Step) -> int:
    """`last` is the step after which the run goes on."""

    def stays(line: bytes) -> bool:
        try:
            record = json.loads(line.decode("utf-8"))
            return "step" not in record or (record["stage_number"], record["step"]) <= last
        except (ValueError, KeyError, TypeError):
            return True  # whoever reads counts what is damaged

    return _cut(Path(folder) / "events.jsonl", position, stays)


def _cut(path: Path, position: int, stays: Callable[[bytes], bool]) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        return 0
    try:
        size = os.fstat(file).st_size
        tail = os.pread(file, size - position, position) if size > position else b""
        lines = tail.splitlines(keepends=True)
        kept = b"".join(line for line in lines if stays(line))
        removed = b"".join(line for line in lines if not stays(line))
        if removed:
            aside = path.with_name(f"{path.stem}.removed{path.suffix}")
            with aside.open("ab") as beside:
                beside.write(removed if removed.endswith(b"\n") else removed + b"\n")
                beside.flush()
                os.fsync(beside.fileno())  # before it goes from where it was
            os.ftruncate(file, position)
            while kept:
                kept = kept[os.write(file, kept) :]
        return len(removed)
    finally:
        os.close(file)

"""Records of steps that a run takes again are taken out of its files, and kept beside them.

A run that goes on from a checkpoint has metrics and events of steps after it. metrics.jsonl is cut at the byte where it
was when the checkpoint was taken; of events.jsonl, lines after that byte are taken out that belong to a later step:
that a run was started, interrupted or failed stays true. What is taken out is appended to *.removed.jsonl.

Happens-before: lines are on the disk beside before they go. Lines that stay are never missing: a file without the
others is written beside and takes the name in one step. A kill in between leaves all as it was, and some lines twice in
*.removed.jsonl. Nobody else writes meanwhile: the supervisor has events before the ranks start and after they end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_dgrpo import points

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
        file = points.open_file("cut.open", path, os.O_RDWR)
    except FileNotFoundError:
        return 0
    try:
        size = os.fstat(file).st_size
        tail = os.pread(file, size - position, position) if size > position else b""
        lines = tail.splitlines(keepends=True)
        kept = b"".join(line for line in lines if stays(line))
        removed = b"".join(line for line in lines if not stays(line))
        if removed:
            _append(path.with_name(f"{path.stem}.removed{path.suffix}"), removed)
            if not kept:
                points.cut("records.cut", file, position)
            else:
                aside = path.with_name(f".{path.name}.new")
                points.write_file("records.new", aside, os.pread(file, position, 0) + kept)
                points.rename("records.name", aside, path)
        return len(removed)
    finally:
        os.close(file)


def _append(path: Path, lines: bytes) -> None:
    file = points.open_file("removed.open", path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # by a kill
        points.write("removed.lines", file, b"\n" * torn + (lines if lines.endswith(b"\n") else lines + b"\n"))
        points.sync("removed.sync", file)  # before they go from where they were
    finally:
        os.close(file)

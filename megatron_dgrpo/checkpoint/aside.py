"""Folders that are whole or not there: written under another name beside their place, then renamed.

The name aside is `.NAME.partial`. Whoever writes it holds a lock on a file in it, so that the left-over of a process
that was killed is told from the work of one that runs, and is removed when the folder is next written. The first rank
owns the folder; the others only write files into it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.pruning import LOCK, aside_of, remove_left_over
from megatron_dgrpo.errors import ConversionError


@contextmanager
def written_aside(target: Path, *, group: dist.ProcessGroup, needed_bytes: int) -> Iterator[Path]:
    """The folder to write into; every rank of the group enters and leaves. It has its name only if nobody failed."""
    first, aside, lock = dist.get_rank(group) == 0, aside_of(target), -1
    try:
        with agreed(group):
            if first:
                with readable(target, needed_bytes):
                    lock = _start(target, aside, needed_bytes)
        with agreed(group):
            if not (aside / LOCK).exists():
                raise ConversionError(f"{aside} is not seen by every rank: choose a place on a shared filesystem")
        yield aside
        with agreed(group):
            if first:
                with readable(target, needed_bytes):
                    _finish(aside, target)
    finally:
        if lock >= 0:
            os.close(lock)
            if aside.exists():  # only if something failed
                points.remove_tree("folder.failed", aside, ignore_errors=True)


@contextmanager
def readable(target: Path, needed_bytes: int) -> Iterator[None]:
    """The system's errors about writing, in words that say what to do."""
    try:
        yield
    except OSError as error:
        parent = next(place for place in target.absolute().parents if place.exists())
        free = shutil.disk_usage(parent).free
        raise ConversionError(
            f"{target} could not be written ({error.strerror or error}): it needs {needed_bytes:,} bytes, {free:,} are "
            "free there. Nothing was left under that name; free space, or choose a place that can be written"
        ) from error


def refuse_taken(target: Path) -> None:
    if os.path.lexists(target):
        raise ConversionError(f"{target} exists already; nothing was overwritten: remove it or choose another name")


def _start(target: Path, aside: Path, needed_bytes: int) -> int:
    """Make the folder and lock it."""
    refuse_taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if aside.exists() and not remove_left_over("folder.left_over", aside):
        raise ConversionError(f"{aside} is being written by another process: wait for it or choose a name")
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise ConversionError(
            f"{target} needs {needed_bytes:,} bytes, {free:,} are free there: free space or choose another place"
        )
    aside.mkdir()
    lock = points.open_file("folder.lock", aside / LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _finish(aside: Path, target: Path) -> None:
    points.remove("folder.unlock", aside / LOCK)
    points.sync_folder("folder.sync", aside)
    if os.path.lexists(target):  # rename would replace an empty folder
        raise ConversionError(f"{target} was made by somebody else in the meantime; nothing was overwritten")
    points.rename("folder.name", aside, target)
    points.sync_folder("folder.parent", target.parent)

"""Checkpoints that go: old ones are removed, damaged ones are set aside. Imports no torch.

A folder that is to be removed is renamed first, so that it is a whole checkpoint or none, also after a kill. What a
kill left half removed or half written goes when the run goes on and when the next one is pruned, unless somebody holds
its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from pathlib import Path

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.manifest import checkpoints, read_manifest
from megatron_dgrpo.errors import CheckpointError

LOCK = ".lock"
"""In a folder that is being written, held by who writes it."""


def aside_of(target: Path) -> Path:
    """The name of a folder that is being written or removed."""
    return target.with_name(f".{target.name}.partial")


def prune(run_dir: str | Path, *, keep_last: int, keep_best: int) -> list[Path]:
    """Remove all but the newest and the best ones (by the held-out reward); returns what was removed."""
    found = checkpoints(run_dir)
    scored = []
    for path in found:
        try:
            score = read_manifest(path).score
        except CheckpointError:
            continue
        if score is not None:
            scored.append((score, path.name, path))
    best = {path for _, _, path in sorted(scored, reverse=True)[:keep_best]}
    removed = [path for path in found[keep_last:] if path not in best]
    for path in removed:
        doomed = aside_of(path)  # from here on it is no checkpoint, also if this is interrupted
        if doomed.exists():
            remove_left_over("prune.left_over", doomed)
        points.rename("prune.name", path, doomed)
        points.remove_tree("prune.tree", doomed)
    remove_left_overs(run_dir)
    return removed


def remove_left_overs(run_dir: str | Path) -> None:
    """Remove what kills left of checkpoints, whether there will be another one or not. What cannot be removed stays:
    nobody takes it for one."""
    for left in (Path(run_dir) / "checkpoints").glob(".*.partial"):
        with contextlib.suppress(OSError):
            remove_left_over("prune.left_over", left)


def remove_left_over(point: str, aside: Path) -> bool:
    """Remove what a process left that was killed while it wrote or removed a folder; False where one works on it."""
    try:
        lock = os.open(aside / LOCK, os.O_RDWR)  # for an exclusive lock NFS wants that
    except FileNotFoundError:  # it was being removed, or had not begun
        points.remove_tree(point, aside)
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)  # first: NFS keeps an open file's folder
    points.remove_tree(point, aside)
    return True


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that nobody takes it for one; returns its new name."""
    for number in itertools.count(1):
        target = folder.with_name(f"{folder.name}.damaged{'' if number == 1 else f'-{number}'}")
        if not target.exists():
            points.rename("damaged.name", folder, target)
            return target
    raise AssertionError("unreachable")


def damaged(run_dir: str | Path) -> list[Path]:
    """Those that were set aside."""
    return sorted(path for path in (Path(run_dir) / "checkpoints").glob("*.damaged*") if path.is_dir())

"""`dgrpo checkpoints RUN`: what there is, whether it is whole; removing and exporting. Imports no torch, but to export.

Without `--verify` a checkpoint counts as whole by its manifest and its files' sizes, which takes no time; with it,
every file is read and hashed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from megatron_dgrpo.checkpoint.manifest import (
    Manifest,
    checkpoints,
    hash_problems,
    read_manifest,
    size_problems,
)
from megatron_dgrpo.checkpoint.pruning import damaged, prune
from megatron_dgrpo.errors import CheckpointError

_COLUMNS = ("name", "stage", "step", "bytes", "score", "age", "state")


def show(run_dir: Path, *, verified: bool, keep: int | None) -> tuple[str, bool]:
    """The table, newest first, and whether all of them are whole. `keep` removes all but the newest so many, first."""
    removed = prune(run_dir, keep_last=keep, keep_best=0) if keep is not None else []
    found = checkpoints(run_dir)
    if not found and not removed:
        raise CheckpointError(f"{run_dir} has no checkpoints: give the run_dir of a run that has saved")
    lines = [f"removed {path.name}" for path in removed]
    rows: list[tuple[str, ...]] = [_COLUMNS]
    problems: list[str] = []
    for folder in found:
        row, wrong = _row(folder, verified)
        rows.append(row)
        problems += [f"{folder.name}: {problem}" for problem in wrong]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{path.name} was damaged and is set aside" for path in damaged(run_dir)]
    return "\n".join([*lines, *problems]), not problems


def _row(folder: Path, verified: bool) -> tuple[tuple[str, ...], list[str]]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return (folder.name, "", "", "", "", "", "unreadable"), [str(error)]
    problems = list(_problems(folder, manifest, verified))
    score = "" if manifest.score is None else f"{manifest.score:.4f}"
    state = "not whole" if problems else "whole" if verified else "not read"
    size = f"{manifest.num_bytes:,}"
    return (folder.name, str(manifest.stage), str(manifest.step), size, score, _age(folder), state), problems


def _problems(folder: Path, manifest: Manifest, verified: bool) -> Iterator[str]:
    found = size_problems(folder, manifest)
    yield from found or (hash_problems(folder, manifest, manifest.files) if verified else [])


def _age(folder: Path) -> str:
    """Clocks that differ, or go backwards, may make it newer than now."""
    seconds = max(0.0, time.time() - folder.stat().st_mtime)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def named(run_dir: Path, name: str) -> Path:
    """A checkpoint by its name, or the newest or best one."""
    found = checkpoints(run_dir)
    if name == "newest" and found:
        return found[0]
    if name == "best":
        scored = [(score, path) for path in found if (score := read_manifest(path).score) is not None]
        if scored:
            return max(scored)[1]
    for path in found:
        if path.name == name:
            return path
    known = ", ".join(path.name for path in found) or "none"
    raise CheckpointError(f"{run_dir} has no checkpoint {name!r} (it has {known}; newest and best stand for one)")

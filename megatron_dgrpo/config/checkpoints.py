"""The sections about checkpoints: when a run's state is saved, what is kept, and what going on from it may overlook."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import Frozen


class Checkpoints(Frozen):
    """When a run's state is saved into RUN/checkpoints, and which of them are kept."""

    every: NonNegativeInt = 50
    """Save after every so many steps of a stage, and at the end of each stage (0: neither)."""
    every_s: PositiveFloat | None = None
    """Save, too, when so many seconds have passed since the last save."""
    keep_last: PositiveInt = 2
    """Keep so many of the newest."""
    keep_best: NonNegativeInt = 0
    """Keep, too, so many of those with the greatest held-out reward, of steps that were evaluated."""
    asynchronous: bool = True
    """Write from a copy in host memory while training goes on; else training waits for the disk."""
    time_limit_s: PositiveFloat | None = None
    """Wall time that the run has from its start: it saves and ends before, with exit status 75."""
    margin_s: PositiveFloat = 300.0
    """So long before the time limit it is told to save and end."""
    grace_s: PositiveFloat = 120.0
    """How long saving and ending may take once a signal or the time limit asks for it; then it is killed."""


class Resume(Frozen):
    """Going on with a run whose folder has checkpoints."""

    allow: tuple[str, ...] = ()
    """Settings that may name something else than when the checkpoint was written, as the refusal lists them."""


def problems(checkpoints: Checkpoints) -> Iterator[str]:
    """What is contradictory; each begins with the key, relative to the section."""
    limit = checkpoints.time_limit_s
    if limit is not None and limit <= checkpoints.margin_s:
        yield (
            f"margin_s: {checkpoints.margin_s:g} leaves nothing of time_limit_s={limit:g}; set it to what saving takes "
            "and less than the limit"
        )


LEAVINGS = ("config.yaml", "environment.json")
"""Both are in every run's folder."""
BEFORE_THE_FIRST_STEP = (*LEAVINGS, ".config.yaml.new", "events.jsonl", "logs", ".lock")
"""All that a run leaves that failed before it had anything to keep: it may be started again, and its logs go on."""


def run_dir_problems(run_dir: str) -> Iterator[str]:
    """A run's folder is new, empty, or that of a run, which goes on."""
    folder = Path(run_dir)
    if folder.is_dir():
        names = {entry.name for entry in folder.iterdir()}
        if not names <= set(BEFORE_THE_FIRST_STEP) and not names >= set(LEAVINGS):
            yield f"run_dir: {folder} is not empty, and no run's folder ({', '.join(LEAVINGS)}); name a new folder"
            return
        if not os.access(folder, os.W_OK | os.X_OK):
            yield f"run_dir: {folder} cannot be written to; make it writable, or name another folder"
            return
    elif folder.exists() or folder.is_symlink():
        yield f"run_dir: {folder} is no folder; name a new one"
        return
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "cannot be written to" if parent.is_dir() else "is no folder"
        yield f"run_dir: {folder} cannot be made: {parent} {what}; name a folder under one that you may write to"

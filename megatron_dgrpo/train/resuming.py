"""The checkpoint that a run goes on from: the newest whole one. Every rank of the world looks, and all agree.

Hashing is shared out over the ranks. A checkpoint that is not whole is set aside under another name and told; the one
before it is tried. Where checkpoints were there and none is whole, the run ends: beginning anew is for the user to
decide. The supervisor has looked at what the run is resumed with (launch/resume.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.manifest import (
    TRAINER,
    Manifest,
    OtherFormatError,
    checkpoints,
    hash_problems,
    read_manifest,
    size_problems,
)
from megatron_dgrpo.checkpoint.pruning import set_aside
from megatron_dgrpo.errors import CheckpointError, listing
from megatron_dgrpo.observe.cut import cut_events, cut_metrics
from megatron_dgrpo.rollout.journal import Journal


@dataclass(frozen=True)
class Resumed:
    """From where a run goes on; without a folder, from the start."""

    folder: Path | None = None
    trainer: dict[str, Any] | None = None
    said: tuple[str, ...] = ()
    """What is to be told, once there are records to tell it in."""

    @property
    def stage(self) -> int:
        return int(self.trainer["stage"]) if self.trainer else 0


def find(run_dir: str | Path) -> Resumed:
    found, said = checkpoints(run_dir), list[str]()
    for folder in found:
        problems = _problems(folder)
        if not problems:
            trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
            return Resumed(folder, trainer, tuple(said))
        with agreed(None):
            if dist.get_rank() == 0:
                aside = set_aside(folder)
                said.append(listing(f"checkpoint {folder.name} is not whole; it is called {aside.name} now:", problems))
    if found:
        raise CheckpointError(
            listing(
                f"None of the {len(found)} checkpoints in {Path(run_dir) / 'checkpoints'} is whole. Remove that folder "
                "to begin from the start, or put a whole copy there:",
                said or ["see rank 0"],
            )
        )
    return Resumed()


def _problems(folder: Path) -> list[str]:
    """All that is wrong with a checkpoint, the same on every rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        manifest: Manifest | None = read_manifest(folder)
        mine: list[str] = []
    except OtherFormatError:  # on every rank: it is not for this version to set aside
        raise
    except CheckpointError as error:
        manifest, mine = None, [str(error)]
    if manifest is not None:
        names = sorted(manifest.files)[rank::size]
        mine = size_problems(folder, manifest) or hash_problems(folder, manifest, names)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine)
    return list(dict.fromkeys(problem for each in everyone for problem in each))


def cut_records(run_dir: str | Path, resumed: Resumed) -> list[str]:
    """On rank 0, before it writes any: take out the records of steps that come again. What there is to say."""
    trainer = resumed.trainer or {"positions": {"metrics": 0, "events": 0}, "stage": 0, "step": -1}
    metrics = cut_metrics(run_dir, trainer["positions"]["metrics"])
    events = cut_events(run_dir, trainer["positions"]["events"], (trainer["stage"], trainer["step"]))
    undone = Journal(Path(run_dir) / "rollouts").go_on((trainer["stage"], trainer["step"]))
    removed = [
        f"{size} bytes of {name}.jsonl are in {name}.removed.jsonl now: their steps are taken again"
        for name, size in (("metrics", metrics), ("events", events))
        if size
    ]
    if undone:
        removed.append(f"the rollouts of {undone} steps are marked as not trained on: they are generated again")
    if resumed.folder is None:
        return [*resumed.said, *removed]
    return [*resumed.said, f"goes on from checkpoint {resumed.folder.name}", *removed]

"""Everything that training goes on from, written while training goes on (manifest.py has the folder's contents).

What happens before what:

    training thread   waits for the write before this one; takes a snapshot: what this rank is to write of live tensors
                      is copied to host memory (only this blocks training)
    writing thread    writes aside, every rank what it holds; syncs; shares out the hashing; the first rank writes the
                      manifest and gives the folder its name; prunes old ones
    training thread   asks, at a later step or at the end, how it went

The writing thread has a process group of its own, so that its collectives never meet those of training. A write that
fails leaves nothing under the final name and is told, not raised: a full disk stops saving, not training.

The optimizer's state is saved as tensors with the names and shapes of the parameters, which load at any layout; each
rank writes its own part of them (optimizer_state.py). Nothing but tensors goes into Megatron's format; numbers are in
trainer.json.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.aside import readable, written_aside
from megatron_dgrpo.checkpoint.manifest import (
    MANIFEST,
    OPTIMIZER,
    TRAINER,
    Manifest,
    contents,
    folder_name,
    hash_file,
)
from megatron_dgrpo.checkpoint.megatron import load_megatron, sharded_weights, write_megatron
from megatron_dgrpo.checkpoint.optimizer_state import Held, allocate, num_steps, optimizers, put_back, sharded_optimizer
from megatron_dgrpo.checkpoint.pruning import prune
from megatron_dgrpo.checkpoint.sharded import load_sharded, save_sharded
from megatron_dgrpo.errors import CheckpointError, DGRPOError
from megatron_dgrpo.model.decoder import Decoder

Trainer = dict[str, Any]
"""What trainer.json holds: numbers, text, lists and mappings."""


@dataclass(frozen=True)
class Saved:
    """How a write went, the same on every rank."""

    target: Path
    num_bytes: int = 0
    blocked_s: float = 0.0
    """How long training waited: for the snapshot."""
    total_s: float = 0.0
    failure: str = ""
    warning: str = ""
    """It is there, but older ones that should be gone are, too."""


@dataclass(frozen=True)
class _Job:
    target: Path
    weights: dict[str, Any]
    optimizer: dict[str, Any] | None
    trainer: Trainer
    manifest: Manifest
    needed: int
    began: float
    blocked_s: float


class Saver:
    """Of one student. Every rank that has a part of it makes one and calls the same methods at the same steps."""

    def __init__(
        self,
        decoder: Decoder,
        run_dir: str | Path,
        source: str | Path,
        *,
        keep_last: int,
        keep_best: int = 0,
        asynchronous: bool = True,
    ) -> None:
        """`source` is the Hugging Face folder whose config and tokenizer go with the weights."""
        self._decoder, self._folder, self._source = decoder, Path(run_dir) / "checkpoints", Path(source)
        self._keep_last, self._keep_best, self._asynchronous = keep_last, keep_best, asynchronous
        ranks = dist.get_process_group_ranks(decoder.groups.world)
        self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._unpruned = ""

    def save(self, optimizer: MegatronOptimizer | None, trainer: Trainer, manifest: Manifest) -> None:
        """Save what is there now; `wait` comes before. `manifest` has everything but the files. An optimizer has made
        an update: before, it has no state."""
        assert self._thread is None and self._saved is None, "wait comes first"
        began = time.monotonic()
        target = self._folder / folder_name(manifest.stage, manifest.step)
        weights = sharded_weights(self._decoder)
        state = None if optimizer is None else sharded_optimizer(self._decoder, optimizer)
        if optimizer is not None:
            trainer = trainer | {"optimizer_steps": num_steps(optimizer)}
        if self._asynchronous:
            live = _live_storages(self._decoder, optimizer)
            for described in (weights, state or {}):
                _snapshot(described, live)
        needed = torch.tensor(_bytes(weights) + _bytes(state or {}), dtype=torch.int64)
        dist.all_reduce(needed, group=self._group)
        blocked_s = time.monotonic() - began
        points.reached("save.snapshot")
        job = _Job(target, weights, state, trainer, manifest, int(needed), began, blocked_s)
        if self._asynchronous:
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run(job)

    def wait(self) -> Saved | None:
        """The end of a write that was begun, if one was. Every rank waits for its own part and for the agreement."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        saved, self._saved = self._saved, None
        return saved

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, job: _Job) -> None:
        try:
            self._write(job)
            points.reached("save.done")
            total_s = time.monotonic() - job.began
            blocked_s = job.blocked_s if self._asynchronous else total_s
            self._saved = Saved(job.target, job.needed, blocked_s, total_s, warning=self._unpruned)
        except (DGRPOError, OSError) as error:
            self._saved = Saved(job.target, failure=str(error))

    def _write(self, job: _Job) -> None:
        group, target = self._group, job.target
        with written_aside(target, group=group, needed_bytes=job.needed) as aside:
            write_megatron(self._decoder, job.weights, self._source, aside, target, job.needed, group=group)
            with agreed(group), readable(target, job.needed):
                if dist.get_rank(group) == 0:
                    content = (json.dumps(job.trainer, indent=1) + "\n").encode()
                    points.write_file("checkpoint.trainer", aside / TRAINER, content)
                    if job.optimizer is not None:
                        (aside / OPTIMIZER).mkdir()
            if job.optimizer is not None:
                save_sharded(job.optimizer, aside / OPTIMIZER, target, job.needed, group=group)
            self._write_manifest(job, aside)
        with agreed(group):
            if dist.get_rank(group) == 0:
                self._unpruned = ""
                try:
                    prune(self._folder.parent, keep_last=self._keep_last, keep_best=self._keep_best)
                except OSError as error:
                    self._unpruned = f"older checkpoints could not be removed ({error})"

    def _write_manifest(self, job: _Job, aside: Path) -> None:
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        mine: dict[str, tuple[int, str]] = {}
        points.reached("save.hash")
        with agreed(self._group), readable(job.target, job.needed):
            names = [path for path in contents(aside) if path.parent != aside or not path.name.startswith(".")]
            mine = {str(path.relative_to(aside)): hash_file(path) for path in names[rank::size]}
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, mine, group=self._group)
        with agreed(self._group), readable(job.target, job.needed):
            if rank == 0:
                files = {name: found for each in everyone for name, found in each.items()}
                content = replace(job.manifest, files=dict(sorted(files.items()))).encode()
                points.write_file("checkpoint.manifest", aside / MANIFEST, content)
                points.sync_folder("checkpoint.sync", aside)


def load_training(decoder: Decoder, optimizer: MegatronOptimizer | None, folder: Path) -> Trainer:
    """Weights and optimizer state of a checkpoint into a model of any layout. Every rank of the model calls it."""
    load_megatron(decoder, folder)
    trainer: Trainer = {}
    with agreed(decoder.groups.world):
        try:
            trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / TRAINER} can't be read ({error})") from None
        if optimizer is not None and not (folder / OPTIMIZER).is_dir():
            raise CheckpointError(
                f"{folder} has no optimizer state: its stage was over. Go on with the next stage, or name another one"
            )
    if optimizer is not None:
        allocate(optimizer, int(trainer["optimizer_steps"]))
        held: Held = []
        described = sharded_optimizer(decoder, optimizer, held)
        with agreed(decoder.groups.world):
            load_sharded(described, folder / OPTIMIZER)
            put_back(held)
    return trainer


# ---- Megatron's descriptions ---------------------------------------------------------------------------------------


def _each(value: Any, look: Callable[[ShardedTensor], None]) -> None:
    if isinstance(value, ShardedTensor):
        look(value)
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _each(inner, look)


def _bytes(described: dict[str, Any]) -> int:
    """Of what this rank writes."""
    total = 0

    def look(entry: ShardedTensor) -> None:
        nonlocal total
        if _is_main(entry):
            total += entry.data.nbytes

    _each(described, look)
    return total


def _is_main(entry: ShardedTensor) -> bool:
    parts = entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)
    return all(part == 0 for part in parts)


def _live_storages(decoder: Decoder, optimizer: MegatronOptimizer | None) -> set[int]:
    """Of all tensors that training goes on to change."""
    tensors = [parameter.data for parameter in decoder.parameters()]
    for each in optimizers(optimizer) if optimizer is not None else []:
        inner = each.optimizer
        tensors += [parameter for group in inner.param_groups for parameter in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _snapshot(described: dict[str, Any], live: set[int]) -> None:
    """Copies in host memory of what this rank writes and training changes."""

    def look(entry: ShardedTensor) -> None:
        if not _is_main(entry):
            return
        if entry.data.device.type != "cpu":
            entry.data = entry.data.detach().to("cpu", copy=True)
        elif entry.data.untyped_storage().data_ptr() in live:
            entry.data = entry.data.detach().clone()

    _each(described, look)

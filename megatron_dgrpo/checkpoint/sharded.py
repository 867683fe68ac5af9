"""Tensors of many ranks in Megatron's distributed format (torch_dist): written by those that hold them, read by any.

Two things of Megatron's are done otherwise here, in the same format. Its synchronous save goes through the machinery of
the asynchronous one: that starts a multiprocessing manager, which imports the caller's main module again (a script
without a guard hangs), and it copies every view of a parameter before it writes the first. torch's own writer
underneath does neither. Its load concatenates parameters that are saved in halves (gate and up-projection), copies of
two thirds of the model, and torch's reader holds two saved tensors at a time; here blocks go into views of the
parameters.

Only tensors are loaded. Transformer Engine's modules save a state of their own beside their weights; FP8 recipes that
scale by the current values leave it empty, and a checkpoint of local layers has none.

`.metadata` is a pickle, by torch's format. It is first read by an unpickler that knows the format's classes and no
others, so that a file from elsewhere can't run anything.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
    verify_checkpoint,
)
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import load as load_with_torch
from torch.distributed.checkpoint import save as save_with_torch
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.aside import readable
from megatron_dgrpo.checkpoint.block_reader import BlockReader
from megatron_dgrpo.errors import ConversionError


def save_sharded(
    described: dict[str, Any], folder: Path, target: Path, needed: int, *, group: dist.ProcessGroup
) -> None:
    """Write what Megatron describes, its factories applied, into a folder that is there. Every rank of the group calls
    it. `target` and `needed` are for the words of an error."""
    sharded, common = extract_sharded_base(described)
    _, everyone = determine_global_metadata(sharded, process_group=group)
    with agreed(group):
        validate_sharding_integrity(everyone)
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=dist.get_rank(group))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    try:
        save_with_torch(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_Writer(folder),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    except CheckpointException as error:  # raised on every rank with the errors of all of them
        causes = [cause for cause, _ in error.failures.values()]
        with readable(target, needed):
            raise next((cause for cause in causes if isinstance(cause, OSError)), OSError(str(causes[0]))) from error
    with agreed(group):
        if dist.get_rank(group) == 0:
            with readable(target, needed):
                backend = dataclasses.asdict(CheckpointingConfig("torch_dist", 1))
                points.write_file("tensors.format", folder / "metadata.json", json.dumps(backend).encode())
                points.sync_folder("tensors.sync", folder)


class _Writer(FileSystemWriter):
    """torch's, with every write, sync and rename at a point."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=False)  # streams sync when they are closed
        self.fs = _Files()


class _Files(FileSystem):
    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb", "it only writes"
        with points.stream("tensors.data", "tensors.data_sync", path) as stream:
            yield stream

    def rename(self, path: Any, new_path: Any) -> None:
        points.rename("tensors.index", path, new_path)


def saved_tensors(folder: Path) -> dict[str, Any]:
    """Megatron's description of every tensor that a folder holds, by its key."""
    with damage_named(folder):
        _check_pickle(folder / ".metadata")
        return TorchDistLoadShardedStrategy().load_tensors_metadata(folder)


def load_sharded(described: dict[str, Any], folder: Path) -> None:
    """Fill the tensors that are described, in place. No collectives."""
    with damage_named(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")  # about Megatron's calls
        _check_pickle(folder / ".metadata")
        verify_checkpoint(str(folder))
        sharded, _ = extract_sharded_base(described)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded)
        tensors = {key: entries for key, entries in by_key.items() if isinstance(entries[0], ShardedTensor)}
        each = [entry for entries in tensors.values() for entry in entries]
        load_with_torch(
            mcore_to_pyt_state_dict(tensors, True),
            storage_reader=BlockReader(folder),
            planner=MCoreLoadPlanner(
                shapes_validation_sharded_tensors=[entry for entry in each if not entry.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors={e.key: e for e in each if e.allow_shape_mismatch},
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
            no_dist=True,
        )


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except ConversionError:
        raise
    except (Exception, CheckpointException) as error:  # whatever the readers of zip files, pickles and JSON raise
        # torch's own is no Exception, and wraps the cause
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        words = f"{type(cause).__name__}: {cause}"
        raise ConversionError(
            f"the tensors in {folder} can't be read ({words}): take another copy, or write it again"
        ) from error


class _FormatOnly(pickle.Unpickler):
    """Knows the classes that torch's format of `.metadata` consists of."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch._C", "layout"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # torch's own would unpickle anything that is in it
            return lambda content: torch.load(io.BytesIO(content), weights_only=True)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in self._MODULES and "." not in name or (module, name) in self._NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of the format")


def _check_pickle(path: Path) -> None:
    with path.open("rb") as file:
        _FormatOnly(file).load()

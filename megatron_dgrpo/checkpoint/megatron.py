"""Megatron's distributed checkpoints of a model's weights: saved at one layout, loaded at any.

    FOLDER/weights/        what Megatron's dist_checkpointing writes and reads (torch_dist)
    FOLDER/model.json      what it holds: format, type, spec
    FOLDER/huggingface/    config and tokenizer, for a later export

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
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
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

from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.aside import readable, sync_folder, write_synced, written_aside
from megatron_dgrpo.checkpoint.block_reader import BlockReader
from megatron_dgrpo.checkpoint.hf.beside import copy_beside
from megatron_dgrpo.checkpoint.hf.exporter import manifest
from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.output_files import nbytes
from megatron_dgrpo.errors import ConversionError, listing
from megatron_dgrpo.model.decoder import Decoder
from megatron_dgrpo.model.spec import ModelSpec

HUGGING_FACE, WEIGHTS = "huggingface", "weights"
_ABOUT = "model.json"
_FORMAT = 1


class About(NamedTuple):
    """What a checkpoint says of itself."""

    spec: ModelSpec
    dtype: torch.dtype
    hugging_face: Path


# ---- Saving -------------------------------------------------------------------------------------------------------


def save_megatron(decoder: Decoder, source: str | Path, target: str | Path) -> None:
    """Save the weights in the decoder's type, with the config and tokenizer of the Hugging Face folder `source`.

    Every rank of the model calls it. The folder has its name once all of it is on the disk.
    """
    source, target, group = Path(source), Path(target), decoder.groups.world
    first, parameter = dist.get_rank(group) == 0, next(decoder.parameters())
    needed = sum(map(nbytes, manifest(decoder.spec, parameter.dtype)))
    with written_aside(target, group=group, needed_bytes=needed) as aside:
        with agreed(group):
            if first:
                with readable(target, needed):
                    (aside / WEIGHTS).mkdir()
                    (aside / HUGGING_FACE).mkdir()
                    copy_beside(source, aside / HUGGING_FACE, _name(parameter.dtype), decoder.spec)
                    about = {"format": _FORMAT, "dtype": _name(parameter.dtype), "spec": _as_json(decoder.spec)}
                    write_synced(aside / _ABOUT, (json.dumps(about, indent=2) + "\n").encode())
        _save_weights(_sharded(decoder), aside / WEIGHTS, target, needed, group=group)
        with agreed(group):
            if first:
                with readable(target, needed):
                    backend = dataclasses.asdict(CheckpointingConfig("torch_dist", 1))
                    write_synced(aside / WEIGHTS / "metadata.json", json.dumps(backend).encode())
                    sync_folder(aside / WEIGHTS)
                    sync_folder(aside / HUGGING_FACE)


def _sharded(decoder: Decoder) -> dict[str, Any]:
    """Megatron's description of what this rank holds, every entry a view of a parameter."""
    described = decoder.sharded_state_dict(metadata={"dp_cp_group": decoder.groups.dp_cp})
    apply_factories(described)
    return described


def _save_weights(
    described: dict[str, Any], folder: Path, target: Path, needed: int, *, group: dist.ProcessGroup
) -> None:
    sharded, common = extract_sharded_base(described)
    _, everyone = determine_global_metadata(sharded, process_group=group)
    with agreed(group):
        validate_sharding_integrity(everyone)
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=dist.get_rank(group))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    try:
        save_with_torch(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    except CheckpointException as error:  # raised on every rank with the errors of all of them
        causes = [cause for cause, _ in error.failures.values()]
        with readable(target, needed):
            raise next((cause for cause in causes if isinstance(cause, OSError)), OSError(str(causes[0]))) from error


# ---- Loading ------------------------------------------------------------------------------------------------------


def read_about(folder: str | Path) -> About:
    """What model a checkpoint holds, from its small files alone."""
    folder = Path(folder)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        form, dtype, described = about["format"], getattr(torch, about["dtype"]), dict(about["spec"])
    except FileNotFoundError:
        raise ConversionError(
            f"{folder} is no Megatron checkpoint of this project ({_ABOUT} is missing): write one with "
            "tools/convert_hf_to_megatron.py"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{folder / _ABOUT} is damaged ({error!r}): convert the model again") from None
    if form != _FORMAT:
        raise ConversionError(f"{folder} has the format {form}, this version reads {_FORMAT}: convert the model again")
    spec = read_spec(folder / HUGGING_FACE)
    now = _as_json(spec)
    changed = [f"{key}: {described[key]!r}, now {now[key]!r}" for key in described if now.get(key) != described[key]]
    if changed:
        title = f"{folder / HUGGING_FACE / 'config.json'} is not the config that the weights were saved with:"
        raise ConversionError(listing(title, changed))
    return About(spec, dtype, folder / HUGGING_FACE)


@torch.no_grad()
def load_megatron(decoder: Decoder, folder: str | Path) -> None:
    """Fill a decoder, of any layout and type, from a checkpoint. Every rank of the model calls it."""
    folder, group = Path(folder), decoder.groups.world
    with agreed(group):
        about = read_about(folder)
        if _as_json(about.spec) != _as_json(decoder.spec):
            raise ConversionError(f"{folder} holds a {about.spec}, the model is a {decoder.spec}")
        with _damage_named(folder):
            _check_pickle(folder / WEIGHTS / ".metadata")
            saved = TorchDistLoadShardedStrategy().load_tensors_metadata(folder / WEIGHTS)
    described = _sharded(decoder)
    _, everyone = determine_global_metadata(described, process_group=group)
    with agreed(group):
        _check_fits(folder, saved, [entry for rank in everyone for entry in rank], decoder.spec)
        with _damage_named(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")  # about Megatron's calls
            _load_weights(described, folder / WEIGHTS)


def _load_weights(described: dict[str, Any], folder: Path) -> None:
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
            allow_shape_mismatch_sharded_tensors={entry.key: entry for entry in each if entry.allow_shape_mismatch},
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        ),
        no_dist=True,
    )


def _check_fits(folder: Path, saved: dict[str, Any], wanted: list[Any], spec: ModelSpec) -> None:
    """Every tensor that is missing, too much or of another shape, in one error."""
    expected = {entry.key: entry for entry in wanted if isinstance(entry, ShardedTensor)}
    problems = [f"{key} is missing" for key in expected if key not in saved]
    problems += [f"{key} is not a tensor of {spec.architecture}" for key in saved if key not in expected]
    for key in expected.keys() & saved.keys():
        found, shape = tuple(saved[key].global_shape), tuple(expected[key].global_shape)
        # the vocabulary is padded to what the layout needs; rows beyond the model's own are zero
        enough = expected[key].allow_shape_mismatch and found[0] >= spec.vocab_size and found[1:] == shape[1:]
        if found != shape and not enough:
            problems.append(f"{key} has shape {list(found)}, the model's is {list(shape)}")
    if problems:
        raise ConversionError(listing(f"the weights in {folder} do not fit its config:", sorted(problems)))


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except ConversionError:
        raise
    except (Exception, CheckpointException) as error:  # whatever the readers of zip files, pickles and JSON raise
        # torch's own is no Exception, and wraps the cause
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        words = f"{type(cause).__name__}: {cause}"
        raise ConversionError(f"the weights in {folder} can't be read ({words}): convert the model again") from error


class _FormatOnly(pickle.Unpickler):
    """Knows the classes that torch's format of `.metadata` consists of."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch._C", "layout"),
            ("torch.serialization", "_get_layout"),
            ("torch.storage", "_load_from_bytes"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in self._MODULES and "." not in name or (module, name) in self._NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of the format")


def _check_pickle(path: Path) -> None:
    with path.open("rb") as file:
        _FormatOnly(file).load()


def _as_json(spec: ModelSpec) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Megatron's distributed checkpoints of a model's weights: saved at one layout, loaded at any.

FOLDER/weights/        what Megatron's dist_checkpointing writes and reads (torch_dist)
FOLDER/model.json      what it holds: format, type, spec
FOLDER/huggingface/    config and tokenizer, for a later export
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import determine_global_metadata

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.aside import readable, written_aside
from megatron_dgrpo.checkpoint.hf.beside import copy_beside
from megatron_dgrpo.checkpoint.hf.exporter import manifest
from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.output_files import nbytes
from megatron_dgrpo.checkpoint.sharded import load_sharded, save_sharded, saved_tensors
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
    needed = sum(map(nbytes, manifest(decoder.spec, next(decoder.parameters()).dtype)))
    with written_aside(target, group=group, needed_bytes=needed) as aside:
        write_megatron(decoder, sharded_weights(decoder), source, aside, target, needed, group=group)


def write_megatron(
    decoder: Decoder,
    described: dict[str, Any],
    source: Path,
    folder: Path,
    target: Path,
    needed: int,
    *,
    group: dist.ProcessGroup,
) -> None:
    """All of it into a folder that is there, which will be called `target`; `described` is what this rank holds."""
    parameter = next(decoder.parameters())
    with agreed(group):
        if dist.get_rank(group) == 0:
            with readable(target, needed):
                (folder / WEIGHTS).mkdir()
                (folder / HUGGING_FACE).mkdir()
                copy_beside(source, folder / HUGGING_FACE, _name(parameter.dtype), decoder.spec)
                about = {"format": _FORMAT, "dtype": _name(parameter.dtype), "spec": _as_json(decoder.spec)}
                content = (json.dumps(about, indent=2) + "\n").encode()
                points.write_file("checkpoint.model", folder / _ABOUT, content)
                points.sync_folder("config.sync", folder / HUGGING_FACE)
    save_sharded(described, folder / WEIGHTS, target, needed, group=group)


def sharded_weights(decoder: Decoder) -> dict[str, Any]:
    """Megatron's description of what this rank holds, every entry a view of a parameter."""
    described = decoder.sharded_state_dict(metadata={"dp_cp_group": decoder.groups.dp_cp})
    apply_factories(described)
    return described


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
        saved = saved_tensors(folder / WEIGHTS)
    described = sharded_weights(decoder)
    _, everyone = determine_global_metadata(described, process_group=group)
    with agreed(group):
        _check_fits(folder, saved, [entry for rank in everyone for entry in rank], decoder.spec)
        load_sharded(described, folder / WEIGHTS)


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


def _as_json(spec: ModelSpec) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

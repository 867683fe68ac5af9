"""Weights out of a sharded model: as an iterator of boxes (for weight transfer), or as a Hugging Face folder.

The iterator yields what this rank holds, in the order of `manifest`, as views of the live parameters; nothing is
gathered. Exactly one rank yields each box, of all that hold it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_dgrpo.checkpoint.hf.importer import box_of
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import ConversionError
from megatron_dgrpo.model.decoder import Decoder, local_parameters
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.parallel import platform

_BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
    torch.float16: "float16",
}


def manifest(spec: ModelSpec, dtype: torch.dtype) -> list[WeightSpec]:
    """Every tensor of the model, in the order of the export; the same on all ranks."""
    return [WeightSpec(rule.hf_name, rule.hf_shape, dtype) for rule in rules(spec)]


def export_shards(decoder: Decoder, dtype: torch.dtype) -> Iterator[WeightShard]:
    """The boxes that this rank answers for, in the order of the manifest."""
    grid, parameters = decoder.groups.grid, local_parameters(decoder)
    for rule in rules(decoder.spec):
        if rule.parameter not in parameters or not rule.answers(grid):
            continue
        for span in rule.held(grid):
            local = parameters[rule.parameter].detach().narrow(rule.axis or 0, span.local, span.length)
            yield WeightShard(rule.hf_name, rule.hf_shape, dtype, box_of(rule, span.hf, span.length), local)


def _gather(decoder: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors on the first rank of the model, one at a time; every rank takes part."""
    group = decoder.groups.world
    first = dist.get_rank(group) == 0
    shards = export_shards(decoder, dtype)
    waiting = next(shards, None)
    for spec in manifest(decoder.spec, dtype):
        whole = torch.zeros(spec.global_shape, dtype=dtype, device=next(decoder.parameters()).device)
        while waiting is not None and waiting.hf_name == spec.hf_name:
            whole[tuple(slice(*bounds) for bounds in waiting.box)] = waiting.local_tensor.to(dtype)
            waiting = next(shards, None)
        dist.reduce(whole, group_dst=0, group=group)  # boxes are disjoint and the rest is zero
        if first:
            yield spec.hf_name, whole.cpu()


def export_folder(decoder: Decoder, source: str | Path, target: str | Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder: config and tokenizer from `source`, weights from the decoder. Every rank calls it.

    The folder is written under another name beside its place and renamed when it is whole.
    """
    source, target = Path(source), Path(target)
    tensors = dict(_gather(decoder, dtype))
    failure: Exception | None = None
    if dist.get_rank(decoder.groups.world) == 0:
        try:
            _write_folder(tensors, source, target, dtype)
        except OSError as error:
            failure = ConversionError(f"{target} could not be written ({error}): free space or choose another place")
        except ConversionError as error:
            failure = error
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=platform.device())
    dist.broadcast(failed, group_src=0, group=decoder.groups.world)
    if failure is not None:
        raise failure
    if failed.item():
        raise ConversionError(f"the first rank could not write {target}; its own message says why")


def _write_folder(tensors: dict[str, torch.Tensor], source: Path, target: Path, dtype: torch.dtype) -> None:
    if target.exists():
        raise ConversionError(f"{target} exists already; nothing was overwritten")
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = _DTYPE_NAMES[dtype]
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in _BESIDE_WEIGHTS:
            if (source / name).exists():
                shutil.copyfile(source / name, aside / name)
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise

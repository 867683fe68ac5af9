"""Weights out of a sharded model: as an iterator of boxes (for weight transfer), or as a Hugging Face folder.

The iterator yields what this rank holds, in the order of `manifest`, as views of the live parameters; nothing is
gathered. Exactly one rank yields each box, of all that hold it.

A folder is written block by block (see `collection`): no rank ever holds more than its shard and a few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.aside import readable, written_aside
from megatron_dgrpo.checkpoint.hf.beside import copy_beside
from megatron_dgrpo.checkpoint.hf.collection import Collection
from megatron_dgrpo.checkpoint.hf.headers import INDEX
from megatron_dgrpo.checkpoint.hf.importer import local_parts
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.checkpoint.hf.output_files import index_json, plan_files
from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.model.decoder import Decoder
from megatron_dgrpo.model.spec import ModelSpec


def manifest(spec: ModelSpec, dtype: torch.dtype) -> list[WeightSpec]:
    """Every tensor of the model, in the order of the export; the same on all ranks."""
    return [WeightSpec(rule.hf_name, rule.hf_shape, dtype) for rule in rules(spec)]


def export_shards(decoder: Decoder, dtype: torch.dtype) -> Iterator[WeightShard]:
    """The boxes that this rank answers for, in the order of the manifest."""
    for rule, box, local in local_parts(decoder):
        if rule.answers(decoder.groups.grid):
            yield WeightShard(rule.hf_name, rule.hf_shape, dtype, box, local)


def export_folder(
    decoder: Decoder,
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = 4 << 30,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write a Hugging Face folder: config and tokenizer from `source`, weights from the decoder. Every rank calls it.

    The folder is written under another name beside its place and renamed when it is whole and on the disk. `advance`
    is told of the bytes of each block, on every rank.
    """
    source, target, group = Path(source), Path(target), decoder.groups.world
    specs = manifest(decoder.spec, dtype)
    files = plan_files(specs, max_shard_bytes)
    needed = sum(file.size for file in files)
    with written_aside(target, group=group, needed_bytes=needed) as aside:
        collection = Collection(export_shards(decoder, dtype), specs, files, aside, group=group, advance=advance)
        try:
            for together in collection.rounds():
                collection.collect(together)
                with agreed(group), readable(target, needed):
                    collection.writer.wait()
        finally:
            collection.writer.close()
        with agreed(group):
            if dist.get_rank(group) == 0:
                with readable(target, needed):
                    if len(files) > 1:
                        points.write_file("export.index", aside / INDEX, index_json(specs, files))
                    copy_beside(source, aside, str(dtype).removeprefix("torch."), decoder.spec)

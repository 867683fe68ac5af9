"""Between Hugging Face folders and Megatron checkpoints: what the conversion tools do.

A conversion runs in the host's memory, in one process or on several ranks that share the model.
The layout decides how much each rank holds, not what is written: a checkpoint loads at any layout.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.aside import refuse_taken
from megatron_dgrpo.checkpoint.hf.exporter import export_folder, manifest
from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.headers import DTYPES, check_tensors
from megatron_dgrpo.checkpoint.hf.importer import import_weights
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.checkpoint.hf.output_files import nbytes
from megatron_dgrpo.checkpoint.megatron import load_megatron, read_about, save_megatron
from megatron_dgrpo.checkpoint.progress import ByteProgress
from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.data.compatibility import check_fits
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import LayoutError, listing
from megatron_dgrpo.model.decoder import Decoder, build_decoder
from megatron_dgrpo.model.layouts import layout_problems
from megatron_dgrpo.model.megatron_config import BuildOptions
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Groups


@contextmanager
def world(timeout_s: float = 3600.0) -> Iterator[int]:
    """torch.distributed as torchrun set it up, or a world of one; gives this process's rank."""
    settings: dict[str, object] = {"backend": platform.backend(), "timeout": timedelta(seconds=timeout_s)}
    if "RANK" not in os.environ:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**settings)  # type: ignore[arg-type]
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def layout(spec: ModelSpec, *, tp: int | None = None, pp: int = 1, ep: int | None = None) -> Groups:
    """Groups over the whole world. Without `tp` and `ep`, the largest that fit the model and divide the world."""
    ranks = dist.get_world_size()
    if tp is None and spec.num_experts:
        tp = 1  # most of the model is experts, which are spread by ep
    if tp is None:
        fitting = (size for size in range(ranks, 0, -1) if ranks % (size * pp) == 0)
        tp = next((size for size in fitting if not layout_problems(spec, Layout(tp=size))), 1)
    if min(tp, pp) < 1 or ranks % (tp * pp):
        raise LayoutError(f"tp={tp} x pp={pp} does not divide the {ranks} ranks: start a multiple of it")
    if ep is None:
        ep = math.gcd(spec.num_experts, ranks // pp) if spec.num_experts else 1
    problems = layout_problems(spec, Layout(tp=tp, dp=ranks // (tp * pp), pp=pp, ep=ep, sequence_parallel=tp > 1))
    if problems:
        raise LayoutError(listing("the conversion can't be laid out so:", problems))
    return Groups(tp=tp, dp=ranks // (tp * pp), pp=pp, ep=ep, timeout_s=3600.0)


def build(spec: ModelSpec, groups: Groups, dtype: torch.dtype) -> Decoder:
    # experts of a model that tensor parallelism cuts, too, are only built with the tokens cut
    options = BuildOptions(dtype=dtype, sequence_parallel=groups.grid.tp > 1 and spec.num_experts > 0)
    return build_decoder(spec, groups=groups, options=options)


def hf_to_megatron(
    hf: Path, out: Path, *, tp: int | None = None, pp: int = 1, ep: int | None = None, dtype: str | None = None
) -> str:
    """Convert a Hugging Face folder; every rank of the world calls it. Returns what there is to say."""
    spec = read_spec(hf)
    with agreed(dist.group.WORLD):
        refuse_taken(out)
        headers = check_tensors(hf, rules(spec), spec)
        notes = check_tokenizer(hf, spec)
    kinds = Counter(header.dtype for header in headers.values())
    name = dtype or str(kinds.most_common(1)[0][0])
    changed = {kind: count for kind, count in kinds.items() if kind != name}
    if changed:
        notes += [f"{count} tensors of {kind} are kept as {name}" for kind, count in changed.items()]
    decoder = build(spec, layout(spec, tp=tp, pp=pp, ep=ep), getattr(torch, name))
    with ByteProgress(f"reading {hf.name}", held_bytes(decoder), shown=dist.get_rank() == 0) as progress:
        import_weights(decoder, hf, advance=progress)
    save_megatron(decoder, hf, out)
    return "\n".join([*notes, f"{out} holds {spec.architecture} in {name}; it loads at any layout"])


def megatron_to_hf(megatron: Path, out: Path, *, dtype: str | None = None) -> str:
    """Convert a Megatron checkpoint; every rank of the world calls it. Returns what there is to say."""
    about = read_about(megatron)
    with agreed(dist.group.WORLD):
        refuse_taken(out)
    target = getattr(torch, dtype) if dtype else about.dtype
    decoder = build(about.spec, layout(about.spec), about.dtype)
    load_megatron(decoder, megatron)
    total = sum(map(nbytes, manifest(about.spec, target)))
    with ByteProgress(f"writing {out.name}", total, shown=dist.get_rank() == 0) as progress:
        export_folder(decoder, about.hugging_face, out, target, advance=progress)
    return f"{out} holds {about.spec.architecture} in {str(target).removeprefix('torch.')}"


def check_tokenizer(folder: Path, spec: ModelSpec) -> list[str]:
    """A tokenizer with ids that the embedding has no row for is an error; none at all is worth a note."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")):
        return [f"{folder} has no tokenizer, so {spec.architecture} is converted without one"]
    check_fits(spec.architecture, Tokenizer.load(folder), spec.vocab_size)
    return []


def held_bytes(decoder: Decoder) -> int:
    return sum(parameter.nbytes for parameter in decoder.parameters())


DTYPE_NAMES = tuple(DTYPES.values())

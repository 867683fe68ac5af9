"""What every rank of a layout would hold, from the real building code on the meta device: shapes without memory.

One process stands for each place of the layout in turn, in process groups of torch's `fake` backend, which have ranks
and sizes and send nothing. Building a model sends nothing either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist

from megatron_dgrpo.config.schema import Layout, Model
from megatron_dgrpo.launch.memory import Held
from megatron_dgrpo.model.decoder import Decoder, build_decoder, local_parameters
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.parallel.groups import Grid, Groups
from megatron_dgrpo.train.options import build_options


def places(layout: Layout) -> Iterator[tuple[int, int]]:
    """(pipeline stage, rank) of one rank for each place whose shapes may differ. Replicas hold the same, and ranks of
    experts as many experts each."""
    grid = Grid(layout.tp, layout.cp, layout.dp, layout.pp, first_rank=0, rank=0, ep=layout.ep, etp=layout.etp)
    seen = set()
    for rank in grid.ranks:
        there = grid.at(rank)
        place = tuple(there.coordinate(axis) for axis in ("pp", "tp", "etp"))
        if place not in seen:
            seen.add(place)
            yield place[0], rank


def stage_holdings(spec: ModelSpec, model: Model) -> list[Held]:
    """What a rank holds, by its pipeline stage. The ranks of a stage hold tensors of the same shapes."""
    found: list[set[Held]] = [set() for _ in range(model.layout.pp)]
    for stage, rank in places(model.layout):
        found[stage].add(_held(build_on_meta(spec, model, rank)))
    assert all(len(one) == 1 for one in found), f"ranks of a stage differ: {found}"
    return [next(iter(one)) for one in found]


def build_on_meta(spec: ModelSpec, model: Model, rank: int) -> Decoder:
    """The decoder of one rank of a world that has the model's ranks and no others. No world may exist already."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layout = model.layout
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        groups = Groups(
            tp=layout.tp,
            cp=layout.cp,
            dp=layout.dp,
            pp=layout.pp,
            ep=layout.ep,
            etp=layout.etp,
            backend="fake",
        )
        groups.seed(0)
        return build_decoder(spec, groups=groups, options=build_options(model), meta=True)
    finally:
        dist.destroy_process_group()


def _held(decoder: Decoder) -> Held:
    layers = sum(len(part.decoder.layers) for part in decoder.parts)
    parameters = local_parameters(decoder)
    experts = sum(p.numel() for name, p in parameters.items() if ".local_experts." in name)
    output = getattr(decoder.parts[-1], "output_layer", None)
    weight = getattr(output, "weight", None)
    return Held(
        layers=layers,
        dense=sum(p.numel() for p in parameters.values()) - experts,
        experts=experts,
        head=0 if weight is None else weight.numel(),
    )

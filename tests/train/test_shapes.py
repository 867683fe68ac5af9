"""What is built on the meta device has the names and shapes of what ranks really build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.schema import Layout, Model
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

SIZES = {"vocab_size": 99, "heads": 4, "kv_heads": 2, "layers": 5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
SP = {"sequence_parallel": True}
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("Qwen3", {"tp": 2, **SP, "pp": 2}, True),
    ("Llama", {"pp": 2, "vpp": 2}, False),
    ("Qwen3Moe", {"dp": 2, "ep": 2, "pp": 2}, False),
    ("Qwen3Moe", {"tp": 2, **SP, "dp": 2, "etp": 2}, True),
    ("Qwen2", {"tp": 4}, True),
]


def _real(rank: int, world: int, folder: str, axes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from megatron_dgrpo.model.decoder import build_decoder, local_parameters
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.options import build_options

    model = Model(path=folder, dtype="float32", layout=Layout(**axes))
    layout = model.layout
    groups = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp)
    groups.seed(0)
    decoder = build_decoder(read_spec(folder), groups=groups, options=build_options(model))
    return {name: tuple(p.shape) for name, p in local_parameters(decoder).items()}


def _meta(rank: int, world: int, folder: str, axes: dict[str, Any]) -> tuple[list[dict[str, tuple[int, ...]]], Any]:
    import torch.distributed as dist

    from megatron_dgrpo.model.decoder import local_parameters
    from megatron_dgrpo.train.shapes import build_on_meta, stage_holdings

    dist.destroy_process_group()
    model = Model(path=folder, dtype="float32", layout=Layout(**axes))
    found = []
    for one in range(model.layout.world_size):
        named = local_parameters(build_on_meta(read_spec(folder), model, one))
        assert all(p.is_meta for p in named.values())
        found.append({name: tuple(p.shape) for name, p in named.items()})
    return found, stage_holdings(read_spec(folder), model)


@pytest.mark.parametrize(("family", "axes", "tied"), CASES)
def test_shapes_without_memory(tmp_path: Path, family: str, axes: dict[str, Any], tied: bool) -> None:
    settings = EXPERTS if "Moe" in family else {}
    folder = save_tiny(tmp_path, family, tied=tied, **SIZES, **settings)
    world = Layout(**axes).world_size
    real = run_distributed(_real, world, str(folder), axes)
    (meta, held), *_ = run_distributed(_meta, 1, str(folder), axes)
    assert meta == real
    for rank, shapes in enumerate(real):
        stage = held[rank * Layout(**axes).pp // world]
        assert stage.all == sum(_numel(shape) for shape in shapes.values())
        assert stage.experts == sum(_numel(shape) for name, shape in shapes.items() if "experts" in name)
    assert [stage.head > 0 for stage in held] == [False] * (len(held) - 1) + [not tied or len(held) > 1]


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product

"""FP8 weights and scales: against float64 and a table of all numbers of e4m3; sharded as whole; what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.model.spec import ModelSpec, Rope
from megatron_dgrpo.rollout import fp8
from megatron_dgrpo.rollout.fp8_format import (
    SCALE,
    is_quantised,
    quantisation_config,
    scale_shape,
    weight_bytes,
    with_scales,
)
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

SPEC = ModelSpec(
    architecture="Qwen3MoeForCausalLM", num_layers=3, hidden_size=256, ffn_size=384, num_heads=8, num_kv_heads=4,
    head_dim=64, vocab_size=161, tied=False, norm_eps=1e-6, rope=Rope(1e4), max_positions=512, qk_norm=True,
    num_experts=4, experts_per_token=2,
)  # fmt: skip


def numbers_of_e4m3() -> torch.Tensor:
    """All finite ones, from their definition: sign, four bits of exponent with bias 7, three of mantissa; no infinity,
    and one bit pattern of each sign that is no number."""
    found = set()
    for sign, exponent, mantissa in itertools.product((1, -1), range(16), range(8)):
        if (exponent, mantissa) == (15, 7):
            continue
        found.add(sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)))
    return torch.tensor(sorted(found), dtype=torch.float64)


def blocks_of(weight: torch.Tensor) -> list[tuple[int, int, torch.Tensor]]:
    rows, columns = scale_shape(weight.shape)
    return [
        (b, c, weight[b * 128 : (b + 1) * 128, c * 128 : (c + 1) * 128]) for b in range(rows) for c in range(columns)
    ]


def drawn(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Blocks of very different sizes, with outliers."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    weight = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    for index, (_, _, block) in enumerate(blocks_of(weight)):
        block *= 10.0 ** (index % 7 - 3)
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 127), (1, 1), (300, 5), (127, 257)])
def test_every_element_is_the_nearest_number_of_fp8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, table = drawn(shape, dtype), numbers_of_e4m3()
    assert (len(table), table.max()) == (253, 448)
    encoded, scales = fp8.quantise(weight)
    assert (encoded.dtype, encoded.shape, scales.dtype) == (torch.float8_e4m3fn, weight.shape, torch.float32)
    assert scales.shape == tuple(-(-n // 128) for n in shape) == scale_shape(shape)
    result = encoded.double()
    for b, c, block in blocks_of(weight.double()):
        scale = scales[b, c].double()
        assert abs(scale / (block.abs().max() / 448) - 1) < 1e-6
        own = result[b * 128 : (b + 1) * 128, c * 128 : (c + 1) * 128]
        assert own.abs().max() == 448  # the whole range is used
        nearest = (block[..., None] / scale - table).abs().amin(-1)
        # Where w / s is a tie but for the rounding of float32, either neighbour is as good.
        assert bool(((block / scale - own).abs() <= nearest + 1e-6 * (block / scale).abs()).all())
    widened = fp8.dequantise(encoded, scales).double()
    bound = torch.cat(
        [
            torch.cat([torch.maximum(x.abs() / 16, scales[b, c].double() / 1024) for b, c, x in row], 1)
            for _, row in itertools.groupby(blocks_of(weight.double()), key=lambda item: item[0])
        ]
    )
    assert bool(((widened - weight.double()).abs() <= bound * (1 + 1e-5)).all())


def test_zeros_and_the_ends_of_the_range() -> None:
    weight = torch.zeros(3 * 128, 128)
    weight[128] = 1e-44  # of which 1 / 448 is no number of float32
    weight[256] = torch.finfo(torch.float32).max
    encoded, scales = fp8.quantise(weight)
    assert scales[:, 0].tolist() == [1.0, torch.finfo(torch.float32).tiny, pytest.approx(3.4028235e38 / 448)]
    assert bool(encoded.float().isfinite().all()) and not bool(encoded[:256].float().any())
    assert bool((encoded[256].float() == 448).all())


def test_boxes_are_those_of_the_whole() -> None:
    weight = drawn((400, 300), torch.bfloat16)
    encoded, scales = fp8.quantise(weight)
    for box in (((0, 400), (0, 300)), ((127, 129), (0, 300)), ((5, 390), (100, 260)), ((256, 400), (128, 256))):
        part = fp8.encode(weight[tuple(slice(*edge) for edge in box)], box, scales)
        assert torch.equal(part.view(torch.uint8), encoded[tuple(slice(*edge) for edge in box)].view(torch.uint8))


# ---- of models ----


def test_what_is_quantised_and_what_it_takes() -> None:
    from megatron_dgrpo.checkpoint.hf.exporter import manifest

    weights = manifest(SPEC, torch.bfloat16)
    found = fp8.manifest_of(weights)
    names = [spec.hf_name for spec in found]
    kept = [spec.hf_name for spec in weights if not is_quantised(*spec[:2])]
    assert {name.split(".")[-2] for name in kept} == {
        "embed_tokens", "input_layernorm", "q_norm", "k_norm", "post_attention_layernorm", "gate", "norm", "lm_head",
    }  # fmt: skip
    assert len(found) == 2 * len(weights) - len(kept) == 3 * (4 + 3 * 4) * 2 + len(kept)
    for before, spec in zip(found, found[1:], strict=False):
        if spec.hf_name.endswith(SCALE):
            assert (before.hf_name + SCALE, scale_shape(before.global_shape)) == spec[:2]
            assert (before.dtype, spec.dtype) == (torch.float8_e4m3fn, torch.float32)
    shapes = {spec.hf_name: spec.global_shape for spec in weights}
    assert with_scales(shapes) == with_scales(with_scales(shapes)) == {s.hf_name: s.global_shape for s in found}
    size = sum(math.prod(spec.global_shape) * spec.dtype.itemsize for spec in found)
    assert size == weight_bytes(shapes.items(), 2) < 0.56 * sum(2 * math.prod(spec.global_shape) for spec in weights)
    config = quantisation_config(names)
    assert config["modules_to_not_convert"] == [*(f"model.layers.{i}.mlp.gate" for i in range(3)), "lm_head"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])


# ---- sharded ----


def assembled(rank: int, world_size: int, folder: str, axes: dict[str, int]) -> dict[str, tuple[object, object]]:
    """On rank 0: every tensor as the ranks' shards make it, and as the whole tensor does."""
    import torch.distributed as dist

    from megatron_dgrpo.checkpoint.hf.exporter import export_shards, manifest
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    groups = Groups(**axes)
    groups.seed(0)
    options = BuildOptions(torch.bfloat16, sequence_parallel=axes["tp"] > 1)
    decoder = load_student(folder, groups=groups, options=options).decoder

    def shards():  # type: ignore[no-untyped-def]
        return export_shards(decoder, torch.bfloat16)

    weights = manifest(decoder.spec, torch.bfloat16)
    of_fp8, specs = fp8.quantised(shards, weights, group=groups.world, device=torch.device("cpu"))
    order = [spec.hf_name for spec in specs]
    mine = list(of_fp8())
    places = [order.index(shard.hf_name) for shard in mine]
    assert places == sorted(places)

    def gather(parts, specs):  # type: ignore[no-untyped-def]
        of_all: list = [None] * world_size
        dist.all_gather_object(of_all, [(p.hf_name, p.box, p.local_tensor, p.scales) for p in parts])
        found = {spec.hf_name: torch.full(spec.global_shape, torch.nan) for spec in specs}
        for name, box, local, scales in itertools.chain.from_iterable(of_all):
            encoded = local if scales is None else fp8.encode(local, box, scales)
            found[name][tuple(slice(*edge) for edge in box)] = encoded.float()
        return found

    whole, parts = gather(list(shards()), weights), gather(mine, specs)
    if rank:
        return {}
    wanted = {}
    for name, tensor in whole.items():
        if is_quantised(name, tensor.shape):
            encoded, wanted[name + SCALE] = fp8.quantise(tensor.bfloat16())
            tensor = encoded.float()
        wanted[name] = tensor
    assert wanted.keys() == parts.keys()
    return {name: (parts[name].numpy(), tensor.numpy()) for name, tensor in wanted.items()}


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("Qwen3", {"tp": 1, "pp": 1, "dp": 1}),
        ("Qwen3", {"tp": 2, "pp": 1, "dp": 1}),
        ("Qwen3Moe", {"tp": 2, "pp": 2, "dp": 1, "ep": 2, "etp": 1}),
        ("Qwen3Moe", {"tp": 2, "pp": 1, "dp": 1, "ep": 1, "etp": 2}),
    ],
)
def test_shards_quantised_where_they_are_make_the_quantised_whole(tmp_path, family, axes) -> None:
    """Of a model whose blocks are cut by every rank's edge, and by the rows that Megatron interleaves."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96) if family == "Qwen3Moe" else {}
    folder = save_tiny(
        tmp_path, family, vocab_size=161, hidden=192, heads=4, kv_heads=2, head_dim=64, intermediate=224, tied=True,
        std=0.2, random_norms=True, dtype="bfloat16", **experts,
    )  # fmt: skip
    found = run_distributed(assembled, axes["tp"] * axes["pp"], str(folder), axes)[0]
    assert sum(name.endswith(SCALE) for name in found) >= 2 * 7
    for name, (parts, whole) in found.items():
        assert (parts == whole).all(), name


def refused(rank: int, world_size: int) -> str:
    """Rank 0 has a NaN in a and an infinity in b, rank 1 an infinity in b; the norm is not quantised."""
    import torch.distributed as dist

    names = ["a.q_proj.weight", "b.up_proj.weight", "c.down_proj.weight", "d.norm.weight"]
    bad = {
        "a.q_proj.weight": [torch.nan, 1.0],
        "b.up_proj.weight": [torch.inf, -torch.inf],
        "d.norm.weight": [torch.nan] * 2,
    }

    def shards():  # type: ignore[no-untyped-def]
        box = ((0, 200), (rank * 128, rank * 128 + 128))
        for name in names:
            local = torch.ones(200, 128)
            local[3, 5] = bad.get(name, [1.0, 1.0])[rank]
            yield WeightShard(name, (200, 256), torch.float32, box, local)

    weights = [WeightSpec(name, (200, 256), torch.float32) for name in names]
    try:
        fp8.quantised(shards, weights, group=dist.group.WORLD, device=torch.device("cpu"))
    except TransferError as error:
        return str(error)
    return ""


def test_what_is_not_finite_is_named_on_all_ranks_before_anything_moves() -> None:
    first, second = run_distributed(refused, 2)
    assert first == second
    assert [line[4:] for line in first.splitlines()[1:]] == ["a.q_proj.weight", "b.up_proj.weight"]

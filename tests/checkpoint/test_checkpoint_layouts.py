"""Every family, from a Hugging Face folder through a checkpoint of one layout and a model of another and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def decoder_of(spec: Any, world: int, axes: dict[str, int]) -> Any:
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups

    tp, pp = axes.get("tp", 1), axes.get("pp", 1)
    groups = Groups(tp=tp, pp=pp, ep=axes.get("ep", 1), etp=axes.get("etp", 1), dp=world // (tp * pp))
    options = BuildOptions(
        dtype=torch.float32, vpp=axes.get("vpp", 1), sequence_parallel=tp > 1 and bool(spec.num_experts)
    )
    decoder = build_decoder(spec, groups=groups, options=options)
    for parameter in decoder.parameters():
        parameter.data.fill_(float("nan"))
    return decoder


def to_megatron(rank: int, world: int, source: str, target: str, axes: dict[str, int]) -> None:
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.checkpoint.megatron import save_megatron

    decoder = decoder_of(read_spec(source), world, axes)
    import_weights(decoder, source)
    assert all(parameter.isfinite().all() for parameter in decoder.parameters())
    save_megatron(decoder, source, target)


def to_hugging_face(rank: int, world: int, source: str, target: str, axes: dict[str, int]) -> None:
    from megatron_dgrpo.checkpoint.hf.exporter import export_folder
    from megatron_dgrpo.checkpoint.megatron import load_megatron, read_about

    about = read_about(source)
    decoder = decoder_of(about.spec, world, axes)
    load_megatron(decoder, source)
    assert all(parameter.isfinite().all() for parameter in decoder.parameters())
    export_folder(decoder, about.hugging_face, target, about.dtype, max_shard_bytes=100_000)


@pytest.mark.parametrize(
    ("family", "settings", "world_1", "axes_1", "world_2", "axes_2"),
    [
        ("Qwen3", {"tied": True}, 4, {"tp": 2, "pp": 2}, 4, {"pp": 2, "vpp": 2}),
        ("Qwen3", {"tied": True}, 1, {}, 4, {"pp": 4}),
        ("Qwen3", {"tied": False}, 4, {"pp": 2, "vpp": 2}, 4, {"tp": 4}),
        ("Qwen3Moe", {"tied": False, **MOE}, 2, {"ep": 2}, 4, {"ep": 4}),
        ("Qwen3Moe", {"tied": False, **MOE}, 4, {"tp": 2, "ep": 2}, 2, {"pp": 2}),
        ("Qwen3Moe", {"tied": False, **MOE}, 1, {}, 4, {"tp": 2, "etp": 2, "ep": 2}),
        ("Qwen2", {"tied": True}, 4, {"tp": 4}, 2, {"pp": 2}),
        ("Llama", {"tied": False}, 2, {"tp": 2}, 2, {"pp": 2}),
        ("Mistral", {"tied": False, "sliding_window": None}, 2, {"pp": 2}, 2, {"tp": 2}),
    ],
)
def test_the_same_bits_come_back(
    tmp_path: Path, family: str, settings: dict[str, Any], world_1: int, axes_1: dict[str, int], world_2: int,
    axes_2: dict[str, int],
) -> None:  # fmt: skip
    sizes = {"vocab_size": 97, "layers": 4, "heads": 4, "kv_heads": 2, "random_norms": True}
    source = save_tiny(tmp_path / "hf", family, **(sizes | settings))
    run_distributed(to_megatron, world_1, str(source), str(tmp_path / "megatron"), axes_1)
    run_distributed(to_hugging_face, world_2, str(tmp_path / "megatron"), str(tmp_path / "out"), axes_2)
    expected = load_file(source / "model.safetensors")
    found = {name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name

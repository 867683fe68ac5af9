"""Hugging Face -> Megatron -> Hugging Face, bit for bit, for every family at layouts that cut it in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Qwen3", {"kv_heads": 1}, {"tp": 2, "pp": 2}),
    ("Qwen3", {"tied": False}, {"pp": 2, "vpp": 2, "dp": 2}),
    ("Qwen2", {}, {"pp": 3}),
    ("Qwen2", {"tied": False, "kv_heads": 1}, {"tp": 4}),
    ("Llama", {"tied": False}, {"tp": 2, "dp": 2}),
    ("Mistral", {"sliding_window": None}, {"pp": 4}),
    ("Qwen3Moe", EXPERTS, {"tp": 2, "dp": 2, "ep": 2, "sequence_parallel": True}),
    ("Qwen3Moe", EXPERTS, {"tp": 2, "etp": 2, "pp": 2, "sequence_parallel": True}),
    ("Qwen3Moe", EXPERTS | {"tied": False}, {"dp": 2, "ep": 2, "pp": 2}),
]


def _there_and_back(rank: int, world: int, source: str, target: str, axes: dict[str, Any]) -> None:
    from megatron_dgrpo.checkpoint.hf.exporter import export_folder
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups

    layout = Layout(**axes)
    groups = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp)
    groups.seed(0)
    options = BuildOptions(torch.bfloat16, sequence_parallel=layout.sequence_parallel, vpp=layout.vpp)
    decoder = build_decoder(read_spec(source), groups=groups, options=options)
    import_weights(decoder, source)
    export_folder(decoder, source, target, torch.bfloat16)


@pytest.mark.parametrize(("family", "settings", "axes"), CASES, ids=str)
def test_the_same_bits_come_back(tmp_path: Path, family: str, settings: dict[str, Any], axes: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    sizes = {"vocab_size": 97, "heads": 4, "kv_heads": 2, "layers": 5, "random_norms": True, "dtype": "bfloat16"}
    source = save_tiny(tmp_path / "source", family, **(sizes | settings))
    run_distributed(_there_and_back, Layout(**axes).world_size, str(source), str(tmp_path / "back"), axes)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

"""Conversion and verification on several ranks, for every family: outputs equal transformers' layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def convert_and_verify(rank: int, world: int, source: str, target: str) -> tuple[str, dict[str, int]]:
    from megatron_dgrpo.checkpoint.convert import hf_to_megatron, layout
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.verify import verify

    hf_to_megatron(Path(source), Path(target))
    grid = layout(read_spec(source)).grid
    return verify(Path(source), Path(target)), {"tp": grid.tp, "dp": grid.dp, "ep": grid.ep}


@pytest.mark.parametrize(
    ("family", "settings", "world", "axes"),
    [
        ("Qwen3", {"tied": True, "dtype": "bfloat16"}, 2, {"tp": 2, "dp": 1, "ep": 1}),
        ("Qwen3", {"tied": False}, 3, {"tp": 1, "dp": 3, "ep": 1}),
        ("Qwen3Moe", {"tied": False, "norm_topk_prob": True, **MOE}, 2, {"tp": 1, "dp": 2, "ep": 2}),
        ("Qwen3Moe", {"tied": False, "dtype": "bfloat16", **MOE}, 1, {"tp": 1, "dp": 1, "ep": 1}),
        ("Qwen2", {"tied": True}, 4, {"tp": 4, "dp": 1, "ep": 1}),
        ("Llama", {"tied": False, "head_dim": 16, "hidden": 96}, 2, {"tp": 2, "dp": 1, "ep": 1}),
        ("Mistral", {"tied": False, "sliding_window": None}, 1, {"tp": 1, "dp": 1, "ep": 1}),
    ],
)
def test_every_family(tmp_path: Path, family: str, settings: dict[str, Any], world: int, axes: dict[str, int]) -> None:
    sizes = {"vocab_size": 97, "layers": 3, "heads": 4, "kv_heads": 2, "random_norms": True, "std": 0.1}
    source = save_tiny(tmp_path / "hf", family, **(sizes | settings))
    for words, grid in run_distributed(convert_and_verify, world, str(source), str(tmp_path / "megatron")):
        assert "all weights have the same bits" in words and grid == axes

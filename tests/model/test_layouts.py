from __future__ import annotations

import math

import pytest

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.model.layouts import layout_problems, padding_unit, pipeline_split
from megatron_dgrpo.model.spec import ModelSpec, Rope


def _spec(**changes: object) -> ModelSpec:
    settings: dict[str, object] = {
        "architecture": "Qwen3ForCausalLM",
        "num_layers": 6,
        "hidden_size": 16,
        "ffn_size": 24,
        "num_heads": 12,
        "num_kv_heads": 3,
        "head_dim": 4,
        "vocab_size": 37,
        "tied": False,
        "norm_eps": 1e-6,
        "rope": Rope(1e4),
        "max_positions": 64,
        "qk_norm": True,
    }
    return ModelSpec(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "spec", "says"),
    [
        ({"tp": 5}, {}, ["does not divide the 12 attention heads", "nor is a multiple of them", "MLP's width 24"]),
        ({"tp": 2}, {}, ["neither divides the 3 key-value heads"]),
        ({"pp": 4, "vpp": 2}, {}, ["pp=4 x vpp=2 is more than the 6 layers"]),
        ({"vpp": 2}, {}, ["set pp=2 or more, or vpp=1"]),
        ({"sequence_parallel": True}, {}, ["set tp=2 or more, or sequence_parallel=false"]),
        ({"dp": 4, "ep": 2, "etp": 2}, {}, ["set ep=1", "set etp=1"]),
        ({"dp": 3, "ep": 3}, {"num_experts": 4}, ["ep=3 does not divide the 4 experts"]),
        ({"tp": 3}, {"num_experts": 4}, ["set sequence_parallel=true"]),
        ({"tp": 3, "etp": 3, "sequence_parallel": True}, {"num_experts": 4, "ffn_size": 16}, ["an expert's width 16"]),
        ({"tp": 3, "sequence_parallel": True, "pp": 3, "vpp": 2}, {}, []),
    ],
)
def test_every_reason_is_listed(layout: dict[str, object], spec: dict[str, object], says: list[str]) -> None:
    found = layout_problems(_spec(**spec), Layout(**layout))  # type: ignore[arg-type]
    assert len(found) == len(says)
    assert all(words in problem for words, problem in zip(says, found, strict=True))


@pytest.mark.parametrize(("layers", "parts"), [(2, 2), (5, 2), (5, 4), (36, 4), (64, 8), (80, 16), (7, 7), (3, 1)])
def test_a_pipeline_is_cut_as_evenly_as_can_be(layers: int, parts: int) -> None:
    split = pipeline_split(layers, parts)
    assert sum(split) == layers and min(split) >= 1 and len(split) == parts
    weights = list(split)
    weights[0] += 1
    weights[-1] += 1
    assert max(weights) == max(math.ceil((layers + 2) / parts), 2 if parts > 1 else layers + 2)


def test_the_embedding_and_the_head_are_counted() -> None:
    assert pipeline_split(30, 4) == [7, 8, 8, 7]
    assert pipeline_split(5, 4) == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        ({"tp": 4}, 1),
        ({"tp": 4, "sequence_parallel": True}, 4),
        ({"tp": 1, "fp8": "tensorwise"}, 16),
        ({"tp": 2, "fp8": "blockwise"}, 128),
        ({"tp": 2, "sequence_parallel": True, "fp8": "mxfp8"}, 64),
    ],
)
def test_the_unit_of_padding(settings: dict[str, object], unit: int) -> None:
    assert padding_unit(**settings) == unit  # type: ignore[arg-type]

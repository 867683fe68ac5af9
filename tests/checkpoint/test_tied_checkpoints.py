"""Megatron checkpoints of tied models: at the ends of a pipeline two copies, saved as one tensor and loaded as two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import Piece, whole
from megatron_dgrpo.testing.tiny import save_tiny

EMBEDDING = "model.embed_tokens.weight"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Qwen3", {}),
    "dense, biases": ("Qwen2", {}),
    "experts": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
}
LAYOUTS: dict[str, dict[str, int]] = {  # all of four ranks
    "dp4": {"dp": 4},
    "tp4": {"tp": 4},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 dp2": {"pp": 2, "dp": 2},
    "pp2 vpp2 tp2": {"pp": 2, "vpp": 2, "tp": 2},
    "pp2 vpp2 dp2": {"pp": 2, "vpp": 2, "dp": 2},
    "pp4": {"pp": 4},
    "ep4": {"dp": 4, "ep": 4},
    "pp2 ep2": {"pp": 2, "dp": 2, "ep": 2},
    "pp2 vpp2 ep2": {"pp": 2, "vpp": 2, "dp": 2, "ep": 2},
    "pp2 tp2 etp2": {"pp": 2, "tp": 2, "etp": 2},
}


def _decoder(spec: Any, axes: dict[str, int]) -> Any:
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups

    assert spec.tied
    vpp, grid = axes.get("vpp", 1), {"tp": 1, "dp": 1} | {axis: n for axis, n in axes.items() if axis != "vpp"}
    options = BuildOptions(torch.float32, vpp=vpp, sequence_parallel=grid["tp"] > 1 and bool(spec.num_experts))
    decoder = build_decoder(spec, groups=Groups(**grid), options=options)
    for parameter in decoder.parameters():
        parameter.data.fill_(float("nan"))
    return decoder


def _held(decoder: Any) -> list[Piece]:
    """What this rank holds; the head that is multiplied with is checked to be the copy among it."""
    from megatron_dgrpo.testing.gradients import pieces

    assert all(parameter.isfinite().all() for parameter in decoder.parameters())
    held = pieces(decoder, "data")
    ends = decoder.groups.grid.first_stage or decoder.groups.grid.last_stage
    assert any(piece.hf_name == EMBEDDING for piece in held) == ends
    if decoder.groups.grid.last_stage:
        head = decoder.head()
        (copy,) = (piece.tensor for piece in held if piece.hf_name == EMBEDDING)
        assert torch.equal(head.weight_VH[: head.num_valid], copy)
    return held


def _save(rank: int, world: int, source: str, target: str, axes: dict[str, int]) -> list[Piece]:
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.checkpoint.megatron import save_megatron

    decoder = _decoder(read_spec(source), axes)
    import_weights(decoder, source)
    save_megatron(decoder, source, target)
    return _held(decoder)


def _load(rank: int, world: int, folder: str, out: str | None, axes: dict[str, int]) -> list[Piece]:
    from megatron_dgrpo.checkpoint.hf.exporter import export_folder
    from megatron_dgrpo.checkpoint.megatron import load_megatron, read_about

    about = read_about(folder)
    decoder = _decoder(about.spec, axes)
    load_megatron(decoder, folder)
    if out:
        export_folder(decoder, about.hugging_face, out, about.dtype)
    return _held(decoder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, layout) -> Megatron checkpoint, the tensors of its source; each written once."""
    home, sources = tmp_path_factory.mktemp("tied"), {}

    def at(family: str, layout: str) -> tuple[Path, dict[str, torch.Tensor]]:
        kind, settings = FAMILIES[family]
        if family not in sources:
            sizes = {"vocab_size": 97, "layers": 5, "heads": 4, "kv_heads": 2, "random_norms": True, "tied": True}
            sources[family] = save_tiny(home / family / "hf", kind, **sizes, **settings)
        expected = load_file(sources[family] / "model.safetensors")
        target = home / family / layout
        if not target.exists():
            held = whole(run_distributed(_save, 4, str(sources[family]), str(target), LAYOUTS[layout]))
            _assert_equal(held, expected)
        return target, expected

    return at


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and "lm_head.weight" not in expected
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("dense", "dp4", "pp4"),
        ("dense", "dp4", "pp2 vpp2 tp2"),
        ("dense", "pp4", "tp4"),
        ("dense", "pp4", "pp2 vpp2 dp2"),
        ("dense", "tp2 pp2", "pp4"),
        ("dense", "tp2 pp2", "dp4"),
        ("dense", "pp2 vpp2 tp2", "pp2 dp2"),
        ("dense, biases", "pp2 vpp2 dp2", "tp2 pp2"),
        ("dense, biases", "tp4", "pp4"),
        ("experts", "pp2 vpp2 ep2", "pp2 tp2 etp2"),
        ("experts", "pp4", "ep4"),
        ("experts", "ep4", "pp2 ep2"),
    ],
)
def test_both_copies_hold_the_saved_bits(saved: Any, family: str, first: str, second: str) -> None:
    folder, expected = saved(family, first)
    _assert_equal(whole(run_distributed(_load, 4, str(folder), None, LAYOUTS[second])), expected)


@pytest.mark.parametrize(
    ("family", "first", "second"), [("experts", "pp2 vpp2 ep2", "pp4"), ("dense, biases", "tp4", "pp2 vpp2 dp2")]
)
def test_an_export_has_one_of_the_copies(saved: Any, tmp_path: Path, family: str, first: str, second: str) -> None:
    folder, expected = saved(family, first)
    run_distributed(_load, 4, str(folder), str(tmp_path / "out"), LAYOUTS[second])
    _assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected)

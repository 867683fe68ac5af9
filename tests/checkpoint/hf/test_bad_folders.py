"""Folders that can't be imported: every problem is listed, on every rank, and nothing of the source is touched."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.headers import check_tensors, read_headers
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.errors import ConversionError
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.distributed import RankError
from megatron_dgrpo.testing.tiny import save_tiny_qwen3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_qwen3(tmp_path / "model", vocab_size=97, tied=False)


def check(folder: Path) -> None:
    spec = read_spec(folder)
    check_tensors(folder, rules(spec), spec)


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def with_header(folder: Path, change: Callable[[dict], object]) -> None:
    """The file with another header over the same data."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_all_problems_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:90].clone()
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 128, dtype=torch.int8)

    changed(folder, change)
    with pytest.raises(ConversionError) as caught:
        check(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  - model.layers.1.self_attn.q_norm.weight is missing",
        "  - model.norm.weight is missing",
        "  - model.layers.2.mlp.up_proj.weight is not a tensor of Qwen3ForCausalLM",
        "  - model.layers.0.mlp.down_proj.weight is neither bfloat16, float16, float32 nor float64",
        "  - lm_head.weight has shape [90, 64], config.json makes it [97, 64]",
    ]


def test_a_config_that_contradicts_its_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96, "tie_word_embeddings": True}))
    with pytest.raises(
        ConversionError, match=r"(?s)gate_proj.weight has shape \[128, 64\], config.json makes it \[96, "
    ):
        check(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), r"it has \d+ bytes, its header says \d+"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), r"it has \d+ bytes, its header says \d+"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "its header would have"),
        (lambda path: path.write_bytes(b"abc"), "it has 3 bytes"),
        (lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:]), "its header would have"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F\xff2"', 1)), "can't decode"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shapf"', 1)), "lacks 'shape'"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'{"', b'["', 1)), "Expecting"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"[97,64]", b"[97,63]", 1)), "bytes for"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1)), "bytes for"),
    ],
)
def test_a_damaged_file(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder / "model.safetensors")
    with pytest.raises(ConversionError, match=f"model.safetensors is truncated or damaged .*{says}"):
        read_headers(folder)


def test_a_header_that_points_elsewhere(folder: Path) -> None:
    def overlap(header: dict) -> None:
        header["model.norm.weight"]["data_offsets"] = [0, 256]

    def negative(header: dict) -> None:
        header["model.norm.weight"]["shape"] = [-64]

    for change, says in ((overlap, "is next"), (negative, r"the shape \[-64\]")):
        original = (folder / "model.safetensors").read_bytes()
        with_header(folder, change)
        with pytest.raises(ConversionError, match=says):
            read_headers(folder)
        (folder / "model.safetensors").write_bytes(original)


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    folder = save_tiny_qwen3(tmp_path / "model", vocab_size=97, tied=False, max_shard_bytes=100_000)
    index = folder / "model.safetensors.index.json"
    original = index.read_text()
    mapped = json.loads(original)["weight_map"]
    read_headers(folder)

    other = next(file for file in mapped.values() if file != mapped["model.norm.weight"])
    for name, file, says in (
        ("model.norm.weight", other, f"model.norm.weight should be in {other} by the index, and is in"),
        ("model.nothing", other, f"model.nothing should be in {other} by the index, and is not"),
        ("model.norm.weight", "model-9.safetensors", "(?s)names files that are not there.*model-9"),
        ("model.norm.weight", "../model-9.safetensors", "is not the name of a file beside it"),
        ("model.norm.weight", None, "is not a safetensors index"),
    ):
        index.write_text(json.dumps({"weight_map": mapped | {name: file}}))
        with pytest.raises(ConversionError, match=says):
            read_headers(folder)
    for text in (original[:-20], original.replace("weight_map", "weight_nap"), "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ConversionError, match="is not a safetensors index"):
            read_headers(folder)


def load(rank: int, world: int, folder: str, gone_for: int | None) -> None:
    from megatron_dgrpo.checkpoint.hf import importer
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    if gone_for == rank:  # between the check and the reading, one node loses sight of the files
        check = importer.check_tensors
        importer.check_tensors = lambda *args: {
            name: dataclasses.replace(header, file=header.file.with_name("gone"))
            for name, header in check(*args).items()
        }
    load_student(folder, groups=Groups(tp=world, dp=1), options=BuildOptions(dtype=torch.float32))


def test_what_one_rank_cannot_read_stops_all(folder: Path) -> None:
    with pytest.raises(
        RankError, match="(?s)1 of 2 ranks failed, all stopped:.*embed_tokens.weight can't be read"
    ) as e:
        run_distributed(load, 2, str(folder), 1, timeout_s=60)
    assert "2 of 2 ranks failed" in str(e.value)


def test_a_tied_head_that_has_other_values(tmp_path: Path) -> None:
    folder = save_tiny_qwen3(tmp_path / "model", vocab_size=97, tied=True)
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    run_distributed(load, 2, str(folder), None)
    changed(folder, lambda tensors: tensors["lm_head.weight"][96, 0].add_(1))
    with pytest.raises(RankError, match="lm_head.weight and model.embed_tokens.weight have different values") as caught:
        run_distributed(load, 2, str(folder), None)
    assert "2 of 2 ranks failed" in str(caught.value)
    changed(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:90].clone()}))
    with pytest.raises(ConversionError, match=r"lm_head.weight has shape \[90, 64\], and config.json ties it to"):
        check(folder)


def test_the_source_is_untouched(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.pop("model.norm.weight"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    with pytest.raises(RankError, match="model.norm.weight is missing"):
        run_distributed(load, 2, str(folder), None)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}

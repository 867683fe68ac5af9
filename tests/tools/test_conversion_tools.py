"""The conversion tools as a user calls them: alone, on ranks that they start themselves, under torchrun."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dgrpo.testing import run_distributed, run_forked
from megatron_dgrpo.testing.tiny import save_tiny_qwen3, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{i}" for i in range(60)]


def model_folder(folder: Path, *, dtype: str = "bfloat16", tied: bool = False, vocab: int = 400) -> Path:
    return save_tiny_qwen3(
        folder, vocab_size=vocab, tied=tied, heads=4, kv_heads=2, dtype=dtype, random_norms=True, std=0.1, layers=3,
        special_ids=save_tokenizer(folder, WORDS),
    )  # fmt: skip


def call(tool: str, *arguments: object) -> tuple[int, str, str]:
    """A tool's status, output and errors, in a process of its own with its imports done."""
    return run_forked(in_process, tool, [str(argument) for argument in arguments])


def in_process(tool: str, arguments: list[str]) -> tuple[int, str, str]:
    from megatron_dgrpo.checkpoint import tools

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = getattr(tools, tool)(arguments)
    return status, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def megatron(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "megatron"
    status, output, errors = call("convert_hf_to_megatron", "--hf", hf, "--out", out)
    assert status == 0 and "Qwen3ForCausalLM in bfloat16; it loads at any layout" in output
    assert "reading" in errors and "100% of" in errors and "\r" not in errors, "plain lines where there is no terminal"
    return out


def changed(hf: Path, copy: Path, name: str, row: int) -> Path:
    shutil.copytree(hf, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name][row] *= 1.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_there_and_back(hf: Path, megatron: Path, tmp_path: Path) -> None:
    assert call("convert_megatron_to_hf", "--megatron", megatron, "--out", tmp_path / "same")[0] == 0
    status = call("convert_megatron_to_hf", "--megatron", megatron, "--out", tmp_path / "wide", "--dtype", "float32")
    assert status[0] == 0 and "in float32" in status[1]
    expected = load_file(hf / "model.safetensors")
    same, wide = load_file(tmp_path / "same/model.safetensors"), load_file(tmp_path / "wide/model.safetensors")
    assert expected.keys() == same.keys() == wide.keys()
    for name, tensor in expected.items():
        assert torch.equal(same[name], tensor) and torch.equal(wide[name], tensor.float()), name


def test_a_right_conversion_is_verified(hf: Path, megatron: Path) -> None:
    status, output, errors = call("verify_conversion", "--hf", hf, "--megatron", megatron)
    assert status == 0, errors
    assert "all weights have the same bits in bfloat16; on 64 random tokens: largest difference" in output


def test_the_first_layer_that_differs_is_named(hf: Path, megatron: Path, tmp_path: Path) -> None:
    other = changed(hf, tmp_path / "other", "model.layers.1.mlp.up_proj.weight", 3)
    status, _, errors = call("verify_conversion", "--hf", other, "--megatron", megatron)
    assert status == 1 and "layer 1 is the first whose output differs, by" in errors
    assert "model.layers.1.mlp.up_proj.weight has other values" in errors and "layers.2" not in errors


def test_a_difference_that_no_drawn_token_shows_is_found(hf: Path, megatron: Path, tmp_path: Path) -> None:
    import numpy as np

    unseen = next(i for i in range(400) if i not in np.random.default_rng(0).integers(0, 400, 64))
    other = changed(hf, tmp_path / "other", "model.embed_tokens.weight", unseen)
    status, _, errors = call("verify_conversion", "--hf", other, "--megatron", megatron)
    assert status == 1 and "embed_tokens.weight has other values" in errors and "first whose output" not in errors


def test_a_config_that_computes_something_else_is_found(hf: Path, megatron: Path, tmp_path: Path) -> None:
    """The same weights under another rope base: only the outputs tell."""
    shutil.copytree(hf, tmp_path / "other")
    config = json.loads((hf / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    status, _, errors = call("verify_conversion", "--hf", tmp_path / "other", "--megatron", megatron)
    assert status == 1 and "layer 0 is the first whose output differs" in errors and "other values" not in errors


def test_what_cannot_be_converted_is_said(hf: Path, megatron: Path, tmp_path: Path) -> None:
    status, _, errors = call("convert_hf_to_megatron", "--hf", hf, "--out", megatron)
    assert status == 1 and errors.startswith("error: ") and "exists already" in errors, "before anything is read"

    small = model_folder(tmp_path / "small", vocab=63)
    shutil.copytree(small, tmp_path / "large-tokenizer")
    save_tokenizer(tmp_path / "large-tokenizer", [f"w{i}" for i in range(70)])
    status, _, errors = call("convert_hf_to_megatron", "--hf", tmp_path / "large-tokenizer", "--out", tmp_path / "a")
    assert status == 1 and "has ids up to 72, and the model a vocabulary of 63" in errors

    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    status, _, errors = call("convert_hf_to_megatron", "--hf", small, "--out", tmp_path / "a")
    assert status == 1 and "GPT2LMHeadModel; known here" in errors
    status, _, errors = call("convert_megatron_to_hf", "--megatron", hf, "--out", tmp_path / "a")
    assert status == 1 and "is no Megatron checkpoint of this project" in errors
    assert not (tmp_path / "a").exists()


def test_mixed_types_and_a_missing_tokenizer_are_noted(tmp_path: Path) -> None:
    folder = save_tiny_qwen3(tmp_path / "hf", vocab_size=97, tied=False, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, output, _ = call("convert_hf_to_megatron", "--hf", folder, "--out", tmp_path / "megatron")
    assert status == 0 and "1 tensors of float32 are kept as bfloat16" in output and "has no tokenizer" in output


def layouts(rank: int, world: int, folder: str) -> list[str]:
    from megatron_dgrpo.checkpoint.convert import layout
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.errors import LayoutError

    spec, found = read_spec(folder), []
    found.append(f"tp={layout(spec, tp=None).grid.tp}")
    found.append(f"tp={layout(spec, tp=1).grid.tp}")
    for tp, pp in ((2, 1), (0, 1), (3, 1)):
        try:
            layout(spec, tp=tp, pp=pp)
        except LayoutError as error:
            found.append(str(error))
    return found


def test_layouts(hf: Path) -> None:
    """Four heads on three ranks: each rank has the whole model, unless told otherwise, which is refused."""
    largest, one, two, none, three = run_distributed(layouts, 3, str(hf))[0]
    assert largest == one == "tp=1"
    assert "tp=2 x pp=1 does not divide the 3 ranks" in two and "tp=0 x pp=1 does not divide the 3 ranks" in none
    assert "tp=3 does not divide the 4 attention heads" in three


def run(*command: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.long
def test_on_ranks_of_its_own_and_under_torchrun(hf: Path, tmp_path: Path) -> None:
    done = run(ROOT / "tools/convert_hf_to_megatron.py", "--hf", hf, "--out", tmp_path / "megatron", "--tp", 2)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "megatron" / "weights").glob("*.distcp"))) == 2
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    done = run(*torchrun, ROOT / "tools/verify_conversion.py", "--hf", hf, "--megatron", tmp_path / "megatron")
    assert done.returncode == 0 and "all weights have the same bits" in done.stdout, done.stderr
    other = changed(hf, tmp_path / "other", "lm_head.weight", 399)  # on the last rank
    done = run(*torchrun, ROOT / "tools/verify_conversion.py", "--hf", other, "--megatron", tmp_path / "megatron")
    assert done.returncode != 0 and "lm_head.weight has other values" in done.stderr
    assert "logits is the first whose output differs" in done.stderr

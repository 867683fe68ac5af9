"""Hugging Face folder -> sharded model -> Hugging Face folder: the same bits, whatever the layout and the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dgrpo.testing import run_distributed, run_forked
from megatron_dgrpo.testing.tiny import save_tiny_qwen3, save_tokenizer

WORDS = [f"w{i}" for i in range(60)]


def model_folder(
    folder: Path, *, vocab: int = 97, tied: bool = True, dtype: str = "float32", shard: int | None = None
) -> Path:
    save_tiny_qwen3(
        folder, vocab_size=vocab, tied=tied, heads=4, kv_heads=2, dtype=dtype, random_norms=True, max_shard_bytes=shard,
        special_ids=save_tokenizer(folder, WORDS), std=0.3,
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def through_megatron(
    rank: int, world: int, source: str, target: str, tp: int, kept: str, dtype: str, shard: int
) -> list[int]:
    """Import and export; the bytes of progress that were told."""
    from megatron_dgrpo.checkpoint.hf.exporter import export_folder
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups

    groups = Groups(tp=tp, dp=world // tp)
    decoder = build_decoder(read_spec(source), groups=groups, options=BuildOptions(dtype=getattr(torch, kept)))
    for parameter in decoder.parameters():
        parameter.data.fill_(float("nan"))
    read: list[int] = []
    import_weights(decoder, source, advance=read.append)
    assert all(parameter.isfinite().all() for parameter in decoder.parameters()), "padding is not left as it was"
    written: list[int] = []
    export_folder(
        decoder, source, target, getattr(torch, dtype), max_shard_bytes=shard or 4 << 30, advance=written.append
    )
    return [sum(read), sum(written)]


@pytest.mark.parametrize(("tied", "vocab"), [(True, 97), (False, 96)])
@pytest.mark.parametrize(
    ("world", "tp", "dtype", "source_shard", "target_shard"),
    [
        (1, 1, "float32", None, 0),
        (1, 1, "bfloat16", 60_000, 40_000),
        (2, 2, "bfloat16", None, 0),
        (2, 2, "float32", 100_000, 50_000),
        (2, 1, "bfloat16", None, 30_000),
        (4, 4, "float32", None, 90_000),
        (4, 2, "bfloat16", 50_000, 0),
    ],
)
def test_the_same_bits_come_back(
    tmp_path: Path, tied: bool, vocab: int, world: int, tp: int, dtype: str, source_shard: int | None, target_shard: int
) -> None:
    source = model_folder(tmp_path / "source", vocab=vocab, tied=tied, dtype=dtype, shard=source_shard)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (source_shard is not None)
    target = tmp_path / "new" / "target"
    told = run_distributed(through_megatron, world, str(source), str(target), tp, dtype, dtype, target_shard)
    expected, found = tensors_of(source), tensors_of(target)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    total = sum(tensor.nbytes for tensor in found.values())
    assert all(written == total for _, written in told) and sum(read for read, _ in told) >= total * (world // tp)

    files = sorted(path.name for path in target.glob("*.safetensors"))
    if target_shard:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert len(files) > 2 and files[1] == f"model-00002-of-{len(files):05d}.safetensors"
        assert index["metadata"]["total_size"] == total and index["weight_map"].keys() == found.keys()
        for name in files:
            with safe_open(target / name, framework="pt") as file:
                assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
                held = sum(found[key].nbytes for key in file.keys())  # noqa: SIM118
                assert held <= target_shard or len(list(file.keys())) == 1
    else:
        assert files == ["model.safetensors"] and not (target / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(("kept", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float16")])
def test_types_are_converted_on_the_way(tmp_path: Path, kept: str, dtype: str) -> None:
    source = model_folder(tmp_path / "source", tied=False)
    run_distributed(through_megatron, 2, str(source), str(tmp_path / "target"), 2, kept, dtype, 60_000)
    found = tensors_of(tmp_path / "target")
    for name, tensor in tensors_of(source).items():
        assert torch.equal(tensor.to(getattr(torch, kept)).to(getattr(torch, dtype)), found[name]), name
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == dtype


def logits_in_transformers(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([tokens])).logits[0].detach()


def logprobs_in_vllm(folders: list[str], tokens: list[int]) -> list[list[float]]:
    """Log-probs that vLLM gives to the tokens from the second on, for each folder."""
    from vllm import LLM, SamplingParams, TokensPrompt

    found = []
    for folder in folders:
        engine = LLM(
            folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 24, max_model_len=64, seed=0
        )
        (out,) = engine.generate(
            TokensPrompt(prompt_token_ids=tokens), SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        found.append([entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)])
        engine.llm_engine.engine_core.shutdown()
    return found


def test_transformers_and_vllm_load_what_was_exported(tmp_path: Path) -> None:
    source, target = model_folder(tmp_path / "source", tied=False), tmp_path / "target"
    run_distributed(through_megatron, 2, str(source), str(target), 2, "float32", "float32", 100_000)
    tokens = [3, 1, 4, 15, 9, 26, 5, 35]
    expected = logits_in_transformers(source, tokens)
    assert torch.equal(logits_in_transformers(target, tokens), expected)
    of_source, of_target = run_forked(
        logprobs_in_vllm, [str(source), str(target)], tokens, preload="engine",
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_CI_ENV": "1"},
    )  # fmt: skip
    assert of_source == of_target
    own = expected.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    assert torch.allclose(own, torch.tensor(of_target), atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("w1 w2").input_ids[-2:] == [1, 2] and tokenizer.chat_template is not None
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config and config["architectures"]
    for name in ("generation_config.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "modeling_own.py").exists(), "code is not copied"

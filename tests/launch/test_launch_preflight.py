"""What an engine could not serve is found before it starts. The numbers are those of vLLM's own check."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.preflight import (
    check_models,
    engine_fp8_problems,
    engine_problems,
    engine_tp_problems,
    kv_bytes,
)
from megatron_dgrpo.model.spec import ModelSpec, Rope

SPEC = ModelSpec(
    architecture="Qwen3ForCausalLM", num_layers=3, hidden_size=64, ffn_size=128, num_heads=4, num_kv_heads=2,
    head_dim=32, vocab_size=100, tied=True, norm_eps=1e-6, rope=Rope(1e4), max_positions=512, qk_norm=True,
)  # fmt: skip

WIDE = replace(SPEC, hidden_size=256, ffn_size=384, num_heads=8, num_kv_heads=4, head_dim=64)


def config(path: str = "small", **engine: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": "run",
            "student": "small",
            "models": {"small": {"path": path, "dtype": "bfloat16"}},
            "engines": {
                "main": {"model": "small", "max_model_len": 512} | engine,
                "unused": {"model": "small", "max_model_len": 10**6, "kv_cache_bytes": 1},
            },
            "evaluation": {
                "data": {"path": "d"}, "engine": "main", "num_prompts": 1, "sampling": {"max_tokens": 8},
                "rewards": [{"kind": "exact_match"}],
            },
            "stages": [{"kind": "sft", "data": {"path": "d"}, "steps": 1, "optimizer": {"lr": 0}, "batch_size": 1}],
        }
    )  # fmt: skip


def problems(block_size: int = 128, **engine: Any) -> list[str]:
    return list(engine_problems(config(**engine), {"small": SPEC}, block_size=block_size))


def test_a_sequence_takes_whole_blocks_and_vllm_one_more() -> None:
    token = 2 * 3 * 2 * 32 * 2  # keys and values x layers x key-value heads x head_dim x bfloat16
    assert kv_bytes(SPEC, 256, 2, 128) == 3 * 128 * token
    assert kv_bytes(SPEC, 257, 2, 128) == 4 * 128 * token
    assert kv_bytes(SPEC, 257, 2, 16) == 18 * 16 * token


@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (1, []),
        (2, []),
        (4, []),  # two ranks have the same key-value head
        (3, ["num_attention_heads of 4", "MLP of 128", "padded vocabulary of 128", "2 key-value heads"]),
        (8, ["num_attention_heads of 4"]),
    ],
)
def test_models_that_vllm_cannot_cut(tp: int, words: list[str]) -> None:
    found = list(engine_tp_problems(SPEC, tp))
    assert len(found) == len(words)
    assert all(word in problem and problem.startswith(str(tp)) for word, problem in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (1, []),
        (2, ["MLP of 384 over 2 ranks"]),
        (4, ["key-value heads of 256 over 4 ranks", "MLP of 384 over 4 ranks"]),
    ],
)
def test_blocks_must_not_be_cut_by_an_engine(tp: int, words: list[str]) -> None:
    found = list(engine_fp8_problems(WIDE, tp))
    assert len(found) == len(words) and all(word in problem for word, problem in zip(words, found, strict=True))


def test_a_narrow_model_has_no_whole_blocks() -> None:
    found = list(engine_fp8_problems(replace(WIDE, hidden_size=192, head_dim=32), 2))
    assert [problem.split(" is ")[0] for problem in found] == [
        "a hidden size of 192",
        "a width of the key-value heads of 128 over 2 ranks",
        "a width of the MLP of 384 over 2 ranks",
    ]


def test_an_fp8_engine_needs_whole_blocks() -> None:
    (hidden, keys) = problems(quantization="fp8")
    assert hidden.startswith("engines.main.quantization: a hidden size of 64 is not cut into whole blocks of 128")
    assert "key-value heads of 64 is" in keys and keys.endswith("change engines.main.tp, or leave quantization out")
    assert list(engine_problems(config(quantization="fp8", tp=1), {"small": WIDE}, block_size=128)) == []


def test_ranks_share_the_key_value_heads() -> None:
    needed = 5 * 128 * 2 * 3 * 2 * 32 * 2
    assert problems(kv_cache_bytes=needed // 2, tp=2) == problems(kv_cache_bytes=needed // 2, tp=4) == []
    assert len(problems(kv_cache_bytes=needed // 2 - 1, tp=4)) == 1


@pytest.mark.parametrize(("dtype", "size"), [(None, 2), ("float32", 4)])
def test_a_cache_that_holds_no_whole_sequence(dtype: str | None, size: int) -> None:
    needed = 5 * 128 * 2 * 3 * 2 * 32 * size
    assert problems(kv_cache_bytes=needed, dtype=dtype) == []
    (problem,) = problems(kv_cache_bytes=needed - 1, dtype=dtype)
    assert problem.startswith("engines.main.kv_cache_bytes: ")
    assert f"set engines.main.kv_cache_bytes={needed} or" in problem
    assert problems(kv_cache_bytes=needed - 1, dtype=dtype, block_size=16) == []


def test_more_positions_than_the_model_has() -> None:
    assert problems() == []
    (problem,) = problems(max_model_len=513)
    assert problem.startswith("engines.main.max_model_len: 513 is more than the 512 positions of 'small'")
    assert "set engines.main.max_model_len=512 or less" in problem


def test_it_is_part_of_what_is_checked_before_a_run(tmp_path: Path) -> None:
    from megatron_dgrpo.testing.tiny import save_tiny

    save_tiny(tmp_path, vocab_size=16, max_positions=64)
    with pytest.raises(ConfigError, match="(?s)engines.main.max_model_len: 512 .*engines.main.kv_cache_bytes: 1 "):
        check_models(config(str(tmp_path), kv_cache_bytes=1))
    check_models(config(str(tmp_path), max_model_len=64))
    settings = json.loads((tmp_path / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}
    settings["rope_parameters"] = {"rope_theta": 1e4} | yarn
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 128}))
    check_models(config(str(tmp_path), max_model_len=128))

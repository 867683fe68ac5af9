"""What keeps an engine from serving a run, point by point; keys in files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.rollout.compatibility import (
    Expected,
    between_replicas,
    differences,
    shared_memory,
    this_side,
    vllm_version,
)
from megatron_dgrpo.rollout.keys import read_key
from megatron_dgrpo.rollout.messages import EngineInfo

RUN = Expected("engines.main", "Qwen3ForCausalLM", 161, 512, "float32", "0.32.0", this_side("cpu", ()), "shared_memory")
INFO = EngineInfo(
    pid=1,
    model_path="models/student",
    architecture="Qwen3ForCausalLM",
    vocab_size=161,
    max_model_len=512,
    dtype="float32",
    vllm_version="0.32.0+cpu",
    block_size=128,
    weight_version=0,
    whole=True,
    shared_memory=shared_memory(),
    num_unfinished=0,
)


def test_the_right_engine_has_no_problem() -> None:
    assert differences(RUN, "engine", INFO) == []
    assert differences(RUN, "engine", replace(INFO, max_model_len=1024)) == []
    assert differences(replace(RUN, vllm_version=None), "engine", replace(INFO, vllm_version="0.1")) == []
    assert vllm_version() == "0.32.0"


@pytest.mark.parametrize(
    ("field", "value", "here", "there"),
    [
        ("architecture", "LlamaForCausalLM", "a Qwen3ForCausalLM", "a LlamaForCausalLM"),
        ("vocab_size", 162, "has 161", "vocabulary of 162"),
        ("max_model_len", 511, "max_model_len=512", "context of 511"),
        ("dtype", "bfloat16", "says float32", "computes in bfloat16"),
        ("quantization", "fp8", "quantization=none", "has weights in fp8"),
        ("vllm_version", "0.31.0", "has 0.32.0", "vLLM 0.31.0"),
        ("shared_memory", "elsewhere/1", "this machine's /dev/shm", "start it on this machine"),
    ],
)
def test_each_difference_names_both_sides(field: str, value: object, here: str, there: str) -> None:
    (problem,) = differences(RUN, "the engine at unix:/e", replace(INFO, **{field: value}))
    assert problem.startswith("the engine at unix:/e ") and here in problem and there in problem


def test_replicas_are_alike() -> None:
    assert between_replicas([("a", INFO), ("b", replace(INFO, pid=2))]) == []
    (problem,) = between_replicas([("a", INFO), ("b", replace(INFO, block_size=16))])
    assert problem == "the replicas differ in block_size (a 128, b 16): start them with one config"


def test_a_key_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match=f"{path} cannot be read as a key.*umask 077"):
        read_key(str(path))
    path.write_text("k" * 31 + "\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no key of 32 characters"):
        read_key(str(path))
    path.write_text("k" * 64 + "\n")
    assert read_key(str(path)) == "k" * 64
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"read by others \(mode 0640\); chmod 600"):
        read_key(str(path))

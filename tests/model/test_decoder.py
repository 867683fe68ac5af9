"""Logits and gradients of imported models against transformers: every family, every kind of layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny
from megatron_dgrpo.testing.transformers_reference import as_reference, gradients_by_file_name

LENGTHS = (7, 40, 5, 9, 3)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # the longest sequence is beyond the original contexts
    "qwen3, tied, 97 ids, one kv head": ("Qwen3", {"vocab_size": 97, "kv_heads": 1}),
    "qwen3, yarn": ("Qwen3", {"tied": False, "rope": YARN}),
    "qwen2.5": ("Qwen2", {"vocab_size": 99, "kv_heads": 1}),
    "qwen2.5, untied, yarn": ("Qwen2", {"tied": False, "rope": YARN | {"attention_factor": 1.3, "truncate": False}}),
    "llama 3": ("Llama", {"rope": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "llama 3, untied, own head size": ("Llama", {"tied": False, "head_dim": 16, "hidden": 96}),
    "mistral": ("Mistral", {"tied": False, "sliding_window": None}),
    "qwen3 moe": ("Qwen3Moe", {"norm_topk_prob": True, **EXPERTS}),
    "qwen3 moe, untied, no normalisation": ("Qwen3Moe", {"tied": False, **EXPERTS}),
}
DENSE = [name for name in FAMILIES if "moe" not in name]
MOE = [name for name in FAMILIES if "moe" in name]

F64, F32 = (torch.float64, 1e-12, 1e-11), (torch.float32, 1e-5, 1e-4)
MOE64 = (torch.float64, 1e-7, 1e-6)  # Megatron's router takes its softmax in float32 whatever the type
SP = {"sequence_parallel": True}
# layouts of dense models; the families take turns, so that each meets every axis
LAYOUTS: list[tuple[dict[str, Any], str]] = [
    ({}, "none"),
    ({"tp": 2}, "none"),
    ({"tp": 2, **SP}, "selective"),
    ({"pp": 2}, "none"),
    ({"tp": 2, "pp": 2}, "none"),
    ({"tp": 2, "pp": 2, **SP}, "full"),
    ({"pp": 2, "vpp": 2}, "full"),
]
CASES = [(name, axes, how, F64) for i, name in enumerate(DENSE) for axes, how in LAYOUTS[i % 2 :: 2]]
CASES += [(DENSE[i % len(DENSE)], axes, how, F32) for i, (axes, how) in enumerate(LAYOUTS)]
CASES += [
    (DENSE[0], {"tp": 4, **SP}, "none", F64),
    (DENSE[2], {"tp": 4, "dp": 2}, "none", F64),
    (DENSE[1], {"tp": 2, "dp": 2, "pp": 2, "vpp": 2, **SP}, "none", F64),
    (DENSE[0], {"pp": 4, "dp": 2}, "none", F64),
    (MOE[0], {}, "none", MOE64),
    (MOE[1], {}, "none", F32),
    (MOE[0], {"dp": 2, "ep": 2}, "none", MOE64),
    (MOE[1], {"tp": 2, "dp": 2, "ep": 2, **SP}, "none", MOE64),
    (MOE[0], {"tp": 2, "ep": 2, **SP}, "none", F32),
    (MOE[1], {"tp": 2, "dp": 2, "etp": 2, **SP}, "full", MOE64),
    (MOE[0], {"tp": 2, "dp": 2, "ep": 2, "etp": 2, **SP}, "none", MOE64),
    (MOE[1], {"dp": 4, "ep": 4}, "selective", MOE64),
    (MOE[0], {"dp": 2, "ep": 2, "pp": 2}, "full", MOE64),
    (MOE[1], {"dp": 2, "ep": 2, "pp": 2, "vpp": 2}, "none", MOE64),
]


def _tokens() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 90, n) for n in LENGTHS]


@cache
def _upstream(length: int, vocab: int) -> torch.Tensor:
    """d loss / d logits, the same for the reference."""
    return torch.randn(length, vocab, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def _logits_and_gradients(
    rank: int, world: int, folder: str, axes: dict[str, Any], recompute: str, dtype: torch.dtype
) -> tuple[dict[int, torch.Tensor], list[Any]]:
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.model.schedule import run_schedule
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import sequence
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    layout = Layout(**axes)
    groups = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp)
    groups.seed(0)
    sp = layout.sequence_parallel
    options = BuildOptions(dtype, sequence_parallel=sp, vpp=layout.vpp, recompute=recompute)
    student = load_student(folder, groups=groups, options=options)
    student.zero_grad()
    sequences = [sequence(str(i), tokens, np.arange(len(tokens)) > 0, i) for i, tokens in enumerate(_tokens())]
    packing = Packing(48, dp=layout.dp, multiple_of=16, rounds_of=layout.pp if layout.vpp > 1 else 1)
    batches = packing.micro_batches(sequences, rank=groups.grid.coordinate("dp"))
    found = {}

    def finish(hidden, batch):
        head = student.decoder.head()
        gather = gather_from_sequence_parallel_region if sp else copy_to_tensor_model_parallel_region
        logits = gather(hidden, group=groups.tp)[:, 0] @ head.weight_VH[: head.num_valid].T
        assert not logits[len(logits) - batch.num_padding :].any(), "padding is zero in every layer"
        loss = logits.sum() * 0
        for document in (tree.trunk for tree in batch.trees):
            upstream = _upstream(document.length, student.decoder.spec.vocab_size).to(dtype)
            part = logits[document.start : document.start + document.length]
            loss = loss + (part * upstream[:, head.start : head.start + head.num_valid]).sum()
            found[document.length] = part.detach()
        return loss, None

    run_schedule(student.decoder, student.wrapped, batches, finish, forward_only=False)
    student.reduce_gradients()
    gather_data_parallel_gradients(student.wrapped)
    return found, pieces(student.decoder, "main_grad")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory):
    """(family, type) -> folder, logits by length, gradients; each computed once."""

    @cache
    def folder(name: str) -> Path:
        family, settings = FAMILIES[name]
        sizes = {"vocab_size": 96, "heads": 4, "kv_heads": 2, "layers": 5, "std": 0.08, "random_norms": True}
        return save_tiny(tmp_path_factory.mktemp("model"), family, **(sizes | settings))

    @cache
    def outcome(name: str, dtype: torch.dtype) -> tuple[Path, dict[int, torch.Tensor], dict[str, torch.Tensor]]:
        reference, logits = as_reference(folder(name), dtype), {}
        for tokens in _tokens():
            found = reference(torch.from_numpy(tokens)[None]).logits[0]
            (found * _upstream(*found.shape).to(dtype)).sum().backward()
            logits[len(tokens)] = found.detach()
        return folder(name), logits, dict(gradients_by_file_name(reference))

    return outcome


def _name(value: Any) -> str:
    return " ".join(f"{k}{v}" for k, v in value.items()) or "one rank" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("family", "axes", "recompute", "precision"), CASES, ids=_name)
def test_logits_and_gradients_equal_transformers(
    expected, family: str, axes: dict[str, Any], recompute: str, precision: tuple[torch.dtype, float, float]
) -> None:
    dtype, logits_within, gradients_within = precision
    folder, logits, wanted = expected(family, dtype)
    ranks = run_distributed(_logits_and_gradients, Layout(**axes).world_size, str(folder), axes, recompute, dtype)
    for length, whole_logits in logits.items():
        shards = [found[length] for found, _ in ranks if length in found]
        assert relative_error(torch.cat(shards, 1), whole_logits) <= logits_within
    gradients = whole((found for _, found in ranks), tolerance=gradients_within)
    assert gradients.keys() == wanted.keys() - ({"lm_head.weight"} if "lm_head.weight" not in gradients else set())
    for name, gradient in wanted.items():
        assert relative_error(gradients[name], gradient) <= gradients_within, name

"""Logits and gradients of an imported model against transformers, at every tensor-parallel layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny_qwen3
from megatron_dgrpo.testing.transformers_reference import as_reference

LENGTHS = (7, 5, 9)


def _tokens() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 90, n) for n in LENGTHS]


def _upstream(length: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """d loss / d logits, the same for the reference."""
    return torch.randn(length, vocab, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


def _logits_and_gradients(rank: int, world: int, folder: str, tp: int, sp: bool, dtype: torch.dtype):
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    from megatron_dgrpo.packing.pack import micro_batches
    from megatron_dgrpo.packing.trees import sequence
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    groups = Groups(tp=tp, dp=world // tp)
    groups.seed(0)
    student = load_student(folder, groups=groups, dtype=dtype, sequence_parallel=sp)
    sequences = [sequence(str(i), tokens, np.arange(len(tokens)) > 0, i) for i, tokens in enumerate(_tokens())]
    place = groups.grid.coordinate
    student.zero_grad()
    head, found = student.decoder.head(), {}
    for layout in micro_batches(sequences, max_tokens=24, rank=place("dp"), size=groups.grid.dp, multiple_of=4):
        hidden = student.wrapped(layout)
        gather = gather_from_sequence_parallel_region if sp else copy_to_tensor_model_parallel_region
        logits = gather(hidden, group=groups.tp)[:, 0] @ head.weight_VH[: head.num_valid].T
        loss = logits.sum() * 0
        for document in (tree.trunk for tree in layout.trees):
            upstream = _upstream(document.length, student.decoder.spec.vocab_size, dtype)
            part = logits[document.start : document.start + document.length]
            loss = loss + (part * upstream[:, head.start : head.start + head.num_valid]).sum()
            found[document.length] = part.detach()
        loss.backward()
    finalize_model_grads([student.wrapped], None, pg_collection=groups.collection)
    gather_data_parallel_gradients(student.wrapped, groups.dp_cp)
    return found, pieces(student.decoder, "main_grad")


@pytest.mark.parametrize(
    ("tied", "vocab", "kv_heads"),
    [(True, 97, 1), (False, 96, 2)],
    ids=["tied, 97 ids, fewer kv heads than tp", "untied"],
)
@pytest.mark.parametrize(
    ("world", "tp", "sp"),
    [(1, 1, False), (2, 2, False), (2, 2, True), (2, 1, False), (4, 4, False), (4, 4, True), (4, 2, True)],
)
@pytest.mark.parametrize(
    ("dtype", "logits_within", "gradients_within"), [(torch.float64, 1e-12, 1e-11), (torch.float32, 1e-5, 1e-4)]
)
def test_logits_and_gradients_equal_transformers(
    tmp_path: Path, tied: bool, vocab: int, kv_heads: int, world: int, tp: int, sp: bool, dtype: torch.dtype,
    logits_within: float, gradients_within: float,
) -> None:  # fmt: skip
    folder = save_tiny_qwen3(
        tmp_path, vocab_size=vocab, tied=tied, heads=4, kv_heads=kv_heads, std=0.08, random_norms=True
    )
    ranks = run_distributed(_logits_and_gradients, world, str(folder), tp, sp, dtype)
    reference = as_reference(folder, dtype)
    for tokens in _tokens():
        expected = reference(torch.from_numpy(tokens)[None]).logits[0]
        (expected * _upstream(len(tokens), vocab, dtype)).sum().backward()
        shards = [found[len(tokens)] for found, _ in ranks if len(tokens) in found]
        assert relative_error(torch.cat(shards, 1), expected.detach()) <= logits_within
    gradients = whole((found for _, found in ranks), tolerance=gradients_within)
    for name, parameter in reference.named_parameters():
        assert relative_error(gradients[name], parameter.grad) <= gradients_within, name

"""Lengths of a long-context batch, drawn with fixed seeds, for tests and benchmarks of packing."""

from __future__ import annotations

import numpy as np

from megatron_dgrpo.model.spec import ModelSpec, Rope
from megatron_dgrpo.packing.trees import Run, Tree

BUDGET = 131_072
QWEN3_8B = ModelSpec(
    architecture="Qwen3ForCausalLM", num_layers=36, hidden_size=4096, ffn_size=12288, num_heads=32, num_kv_heads=8,
    head_dim=128, vocab_size=151_936, tied=False, norm_eps=1e-6, rope=Rope(1e6), max_positions=131_072, qk_norm=True,
)  # fmt: skip


def long_context_trees(num_groups: int, seed: int, *, group_size: int = 8) -> list[Tree]:
    """Prompts: log-normal, median 16k, sigma 1, from 256 up to 120k tokens. Responses: 512 to 1536 tokens, evenly."""
    draw = np.random.default_rng(seed)
    prompts = np.clip(np.exp(draw.normal(np.log(16_384), 1.0, num_groups)), 256, 120_000).astype(int)
    responses = draw.integers(512, 1537, (num_groups, group_size))
    trees, stream = [], 0
    for group, length in enumerate(prompts):
        branches = []
        for sample, size in enumerate(responses[group]):
            branches.append(_run(f"sample {sample} of prompt {group}", int(size), int(size), stream))
            stream += int(size)
        trees.append(Tree(_run(f"prompt {group}", int(length), 0, 0), tuple(branches)))
    return trees


def _run(name: str, length: int, num_targets: int, stream: int) -> Run:
    return Run(name, np.zeros(length, np.int64), np.arange(num_targets), stream)

"""What a decoder is, independent of its layout and of the library that builds it. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings: frequencies 1 / base ** (2 i / head_dim), which some kinds stretch for longer contexts."""

    base: float
    kind: Literal["default", "llama3", "yarn"] = "default"
    factor: float = 1.0
    """How far low frequencies are stretched (llama3, yarn)."""
    original_max_positions: int = 0
    """Context of the model before it was stretched (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / low_freq_factor are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / high_freq_factor stay as they are."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this in the original context stay as they are."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are stretched in full."""
    truncate: bool = True
    """yarn: round the bounds of the range between the two to whole dimensions."""
    attention_factor: float = 1.0
    """yarn: multiplies cosine and sine of both queries and keys."""


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """The factor that YaRN means where none is given."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


@dataclass(frozen=True)
class ModelSpec:
    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Width of the MLP, or of one expert."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    """The output head is the embedding."""
    norm_eps: float
    rope: Rope
    max_positions: int
    qk_norm: bool
    qkv_bias: bool = False
    num_experts: int = 0
    """0: every layer has one dense MLP; else each has so many experts."""
    experts_per_token: int = 0
    normalize_router: bool = True
    """The chosen experts' probabilities are made to sum to 1."""

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding so that every tensor-parallel rank has as many."""
        return -(-self.vocab_size // tp) * tp

    def vocabulary_shard(self, rank: int, tp: int) -> tuple[int, int]:
        """First id of a tensor-parallel rank's rows, and how many of them are ids; the rest is padding."""
        length = self.padded_vocab_size(tp) // tp
        return rank * length, max(0, min(length, self.vocab_size - rank * length))

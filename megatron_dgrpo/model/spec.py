"""What a decoder is, independent of its layout and of the library that builds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings: frequencies 1 / base ** (2 i / head_dim)."""

    base: float


@dataclass(frozen=True)
class ModelSpec:
    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
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

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding so that every tensor-parallel rank has as many."""
        return -(-self.vocab_size // tp) * tp

    def layout_problems(self, tp: int) -> list[str]:
        """Every reason for which this model can't be cut into `tp` shards."""
        problems = []
        if self.num_heads % tp:
            problems.append(f"tp={tp} does not divide the {self.num_heads} attention heads: choose a divisor of them")
        if self.ffn_size % tp:
            problems.append(f"tp={tp} does not divide the MLP's width {self.ffn_size}: choose a divisor of it")
        if max(self.num_kv_heads, tp) % min(self.num_kv_heads, tp):
            problems.append(
                f"tp={tp} neither divides the {self.num_kv_heads} key-value heads nor is a multiple of them"
            )
        return problems

"""FLOPs of a decoder per token, per pair of a query and a key that it sees, and per loss row."""

from __future__ import annotations

from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.packing.cost import Cost


def forward_cost(spec: ModelSpec) -> Cost:
    """A forward pass: 2 FLOPs a weight and token in linear layers, 4 a pair and element of the query heads."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = 2 * spec.hidden_size * (queries + keys)  # query and output, key and value
    mlp = 3 * spec.hidden_size * spec.ffn_size * (spec.experts_per_token or 1) + spec.hidden_size * spec.num_experts
    return Cost(
        token=2.0 * spec.num_layers * (attention + mlp),
        pair=4.0 * spec.num_layers * queries,
        row=2.0 * spec.hidden_size * spec.vocab_size,
    )


def training_cost(spec: ModelSpec) -> Cost:
    """Forward and backward. Backward is twice forward in linear layers, and 2.5 times in attention, whose probabilities
    are made again; a row's logits are made again as well."""
    forward = forward_cost(spec)
    return Cost(token=3.0 * forward.token, pair=3.5 * forward.pair, row=4.0 * forward.row)

"""Core attention over trees, in the place of Megatron's.

The layout record says which tokens see each other; Megatron's attention masks are not used.

Legend: S tokens on this rank, B the batch axis (always 1: trees are packed along S), N heads, K key-value heads, D head
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dgrpo.model.tree_attention import tree_attention
from megatron_dgrpo.packing.layout import Layout


class LayoutParams(PackedSeqParams):
    """A layout record in the place where Megatron hands packing information down to attention."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(qkv_format="sbhd")  # anything but "thd", whose fields Megatron would read
        self.layout = layout


class PackedAttention(torch.nn.Module):
    """Takes the place of Megatron's DotProductAttention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and config.attention_dropout == 0.0
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.cp_group = pg_collection.cp if pg_collection.cp.size() > 1 else None

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBKD: torch.Tensor,
        value_SBKD: torch.Tensor,
        attention_mask: None = None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: LayoutParams | None = None,
    ) -> torch.Tensor:
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        out_SND = tree_attention(
            query_SBND.squeeze(1),
            key_SBKD.squeeze(1),
            value_SBKD.squeeze(1),
            packed_seq_params.layout.attention,
            group=self.cp_group,
            scale=self.scale,
        )
        return out_SND.flatten(1)[:, None]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

"""The layer that a decoder is made of: `local` from Megatron-Core's own modules, `te` with Transformer Engine's.

Both have the same structure and the same parameter names: `te` replaces the linear layers (for bfloat16 and FP8
products, and grouped products of experts), while norms, rotary embeddings and core attention are this project's own in
either. Norms are not fused into the linear layers after them, since a fused norm rounds otherwise than the rollout
engine's.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules, get_mlp_module_spec_for_backend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_dgrpo.errors import LayoutError
from megatron_dgrpo.model.attention import PackedAttention
from megatron_dgrpo.model.norm import RMSNorm
from megatron_dgrpo.model.spec import ModelSpec

Layers = Literal["auto", "te", "local"]


def choose_layers(layers: Layers, fp8: str | None, offload_layers: int = 0) -> Literal["te", "local"]:
    """`auto` is Transformer Engine where it and a GPU are there."""
    found = importlib.util.find_spec("transformer_engine") is not None
    if layers == "auto":
        layers = "te" if found and torch.cuda.is_available() else "local"
    if layers == "te" and not found:
        raise LayoutError(
            "layers=te needs Transformer Engine, which is not installed: install the extra `megatron-dgrpo[gpu]`, or "
            "set layers=local"
        )
    if fp8 is not None and layers == "local":
        raise LayoutError(f"fp8={fp8} needs Transformer Engine's layers: set layers=te, or fp8=null")
    if offload_layers and layers == "local":
        raise LayoutError(
            f"offload_layers={offload_layers} needs Transformer Engine's layers: set layers=te, or offload_layers=0"
        )
    return layers


def block(spec: ModelSpec, num_layers: int, layers: Literal["te", "local"]) -> TransformerBlockSubmodules:
    backend = _unfused_te() if layers == "te" else LocalSpecProvider()
    layer = get_gpt_layer_local_submodules(qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.mlp = get_mlp_module_spec_for_backend(
        backend=backend, num_experts=spec.num_experts or None, moe_grouped_gemm=layers == "te"
    )
    attention = layer.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = backend.column_parallel_linear(), backend.row_parallel_linear()
    attention.core_attention = PackedAttention
    if spec.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    specs = [ModuleSpec(module=TransformerLayer, submodules=layer)] * num_layers
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _unfused_te() -> Any:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class Unfused(TESpecProvider):  # type: ignore[misc]
        def fuse_layernorm_and_linear(self) -> bool:
            return False

    return Unfused()

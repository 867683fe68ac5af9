"""Megatron's configuration of a model on a layout.

What is wrong in Megatron without a word is configured away here: pipelines with virtual stages communicate wrongly
unless `overlap_p2p_comm` is on and `batch_p2p_comm` off (and plain pipelines refuse the former); micro-batches of
different lengths need `variable_seq_lengths`, which asks for the all-to-all token dispatcher even of dense models.
Fusions that need CUDA extensions are off. There is no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dgrpo.model.layers import Layers
from megatron_dgrpo.model.layouts import FP8, pipeline_split
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.parallel.groups import Grid

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class BuildOptions:
    """How a model is built, beside its spec and its process groups."""

    dtype: torch.dtype
    sequence_parallel: bool = False
    vpp: int = 1
    recompute: Recompute = "none"
    offload_layers: int = 0
    """The first layers, whose activations wait for backward in host memory."""
    layers: Layers = "auto"
    fp8: FP8 | None = None


class Split(PipelineParallelLayerLayout):
    """Megatron's record of a pipeline's split, which answers for this rank without asking its global state."""

    def __init__(self, num_layers: int, grid: Grid, vpp: int) -> None:
        layers = pipeline_split(num_layers, grid.pp * vpp)
        parts = [[LayerType.decoder] * n for n in layers]
        parts[0].insert(0, LayerType.embedding)
        parts[-1].append(LayerType.loss)
        super().__init__(parts, grid.pp)
        self._layers, self._pp, self._stage = layers, grid.pp, grid.coordinate("pp")

    def get_num_layers_to_build(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        assert layer_type == LayerType.decoder
        return self._layers[self._part(vp_stage, pp_rank)]

    def get_layer_offset(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        assert layer_type == LayerType.decoder
        return sum(self._layers[: self._part(vp_stage, pp_rank)])

    def _part(self, vp_stage: int | None, pp_rank: int | None) -> int:
        return (vp_stage or 0) * self._pp + (self._stage if pp_rank is None else pp_rank)


def megatron_config(spec: ModelSpec, grid: Grid, options: BuildOptions, layers: Literal["te", "local"]) -> Any:
    dtype, interleaved = options.dtype, options.vpp > 1
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=grid.tp,
        context_parallel_size=grid.cp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=options.vpp if interleaved else None,
        pipeline_model_parallel_layout=Split(spec.num_layers, grid, options.vpp) if grid.pp > 1 else None,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp,
        sequence_parallel=options.sequence_parallel,
        variable_seq_lengths=grid.pp > 1,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        calculate_per_token_loss=True,  # the weights of the streams carry the whole normalisation
        moe_token_dispatcher_type="alltoall",
        **_recompute(options.recompute),
        cpu_offloading=options.offload_layers > 0,
        cpu_offloading_num_layers=options.offload_layers,
        **_experts(spec, dtype, layers),
        **_fp8(options.fp8),
    )


def _recompute(recompute: Recompute) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":  # attention again in backward; the rest is kept
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _experts(spec: ModelSpec, dtype: torch.dtype, layers: str) -> dict[str, Any]:
    """No token is dropped, and nothing but the objective has a gradient: no balancing loss, no jitter."""
    if not spec.num_experts:
        return {}
    return {
        "num_moe_experts": spec.num_experts,
        "moe_ffn_hidden_size": spec.ffn_size,
        "moe_router_topk": spec.experts_per_token,
        "moe_router_pre_softmax": not spec.normalize_router,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp64" if dtype == torch.float64 else None,  # else the model's, as in the rollout engine
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": layers == "te",
    }


def _fp8(recipe: FP8 | None) -> dict[str, Any]:
    """Weights stay bfloat16; products are in FP8. Blockwise and MXFP8 use E4M3 throughout, gradients included."""
    if recipe is None:
        return {}
    return {"fp8": "hybrid" if recipe == "tensorwise" else "e4m3", "fp8_recipe": recipe}

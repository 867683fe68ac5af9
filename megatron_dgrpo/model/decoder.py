"""Building a decoder on Megatron-Core. The choice of Megatron's class stands here and nowhere else.

What is built is Megatron's GPTModel with three parts of this project's own: core attention (it knows packing), norms
(they round as the rollout engine's do) and rotary embeddings (from explicit positions). Its forward takes a layout
record and gives final hidden states: the vocabulary is the business of the heads.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_dgrpo.errors import LayoutError, listing
from megatron_dgrpo.heads import HeadShard
from megatron_dgrpo.model.attention import LayoutParams, PackedAttention
from megatron_dgrpo.model.norm import RMSNorm
from megatron_dgrpo.model.rotary import rotary_angles
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Groups


def transformer_config(spec: ModelSpec, *, groups: Groups, dtype: torch.dtype, sequence_parallel: bool) -> Any:
    """Megatron's configuration of this model on this layout. Fusions that need CUDA extensions are off."""
    grid = groups.grid
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
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=grid.tp,
        context_parallel_size=grid.cp,
        pipeline_model_parallel_size=grid.pp,
        sequence_parallel=sequence_parallel,
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
    )


def _block(config: TransformerConfig, spec: ModelSpec, pp_rank: int) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_submodules(qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if spec.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    specs = [ModuleSpec(module=TransformerLayer, submodules=layer)] * get_num_layers_to_build(config, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


class Decoder(GPTModel):
    """Layout record in, final hidden states `[s, 1, h]` (`[s / tp, 1, h]` under sequence parallelism) out."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, groups: Groups) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=_block(config, spec, groups.grid.coordinate("pp")),
            vocab_size=spec.padded_vocab_size(groups.grid.tp),
            max_sequence_length=spec.max_positions,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="none",
            parallel_output=True,
            pg_collection=groups.collection,
        )
        self.spec, self.groups = spec, groups

    def _preprocess(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> tuple[Any, ...]:
        prepared = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        angles = rotary_angles(position_ids[0], self.spec.rope, self.spec.head_dim)
        return (prepared[0], angles, *prepared[2:])

    def forward(self, layout: Layout) -> torch.Tensor:  # type: ignore[override]
        where = platform.device()
        return super().forward(
            input_ids=torch.from_numpy(layout.tokens_S)[None].to(where),
            position_ids=torch.from_numpy(layout.positions_S)[None].to(where),
            attention_mask=None,
            packed_seq_params=LayoutParams(layout),
            output_processor=lambda hidden_states, **_: hidden_states,
        )

    def head(self) -> HeadShard:
        """This rank's shard of the output head, for the heads to multiply with."""
        weight = self.shared_embedding_or_output_weight() if self.spec.tied else self.output_layer.weight
        start = self.groups.grid.coordinate("tp") * weight.shape[0]
        return HeadShard(weight, start, max(0, min(weight.shape[0], self.spec.vocab_size - start)))


def build_decoder(spec: ModelSpec, *, groups: Groups, dtype: torch.dtype, sequence_parallel: bool = False) -> Decoder:
    """A decoder with uninitialised weights, on this rank's device."""
    problems = spec.layout_problems(groups.grid.tp)
    if problems:
        raise LayoutError(listing(f"{spec.architecture} does not fit the layout:", problems))
    config = transformer_config(spec, groups=groups, dtype=dtype, sequence_parallel=sequence_parallel)
    return Decoder(spec, config, groups).to(platform.device())

"""Building a decoder on Megatron-Core. The choice of Megatron's class stands here and nowhere else.

What is built is Megatron's GPTModel with three parts of this project's own: core attention (it knows packing), norms
(they round as the rollout engine's do) and rotary embeddings (from explicit positions). It takes a layout record and
gives final hidden states: the vocabulary is the business of the heads.

A rank holds one part of a pipeline's layers, or with virtual stages several, which are not neighbours. A `Decoder` is
all that a rank holds of a model, and its `parts` are what Megatron's schedules run.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_dgrpo.config.schema import Layout as Axes
from megatron_dgrpo.errors import LayoutError, listing
from megatron_dgrpo.heads import HeadShard
from megatron_dgrpo.model.attention import LayoutParams
from megatron_dgrpo.model.layers import block, choose_layers
from megatron_dgrpo.model.layouts import layout_problems
from megatron_dgrpo.model.megatron_config import BuildOptions, megatron_config
from megatron_dgrpo.model.rotary import rotary_angles
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Groups


class Part(GPTModel):
    """Consecutive layers, with the embedding before the first and the final norm after the last of the model.

    Layout record in, hidden states `[s, 1, h]` (`[s / tp, 1, h]` under sequence parallelism) out: the final ones, or
    those to send to the next part.
    """

    def __init__(self, spec: ModelSpec, config: TransformerConfig, groups: Groups, layers: Any, number: int) -> None:
        split, stage = config.pipeline_model_parallel_layout, groups.grid.coordinate("pp")
        virtual = config.virtual_pipeline_model_parallel_size or 1
        vp_stage = number if virtual > 1 else None
        super().__init__(
            config=config,
            transformer_layer_spec=block(
                spec, split.get_num_layers_to_build(vp_stage=vp_stage) if split else spec.num_layers, layers
            ),
            vocab_size=spec.padded_vocab_size(groups.grid.tp),
            max_sequence_length=spec.max_positions,
            pre_process=stage == 0 and number == 0,
            post_process=stage == groups.grid.pp - 1 and number == virtual - 1,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="none",
            parallel_output=True,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        self.spec, self.groups = spec, groups
        for layer in self.decoder.layers:  # Megatron multiplies cosine and sine by it; it has no setting that means it
            assert layer.self_attention._yarn_concentration_factor == 1.0
            layer.self_attention._yarn_concentration_factor = spec.rope.attention_factor

    def _preprocess(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden, _, *rest = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        padding = kwargs["packed_seq_params"].layout.num_padding
        if self.pre_process and padding:
            hidden = self._without_padding(hidden, input_ids.shape[1], padding)
        if self.pre_process:
            hidden = _with_plain_strides(hidden)
        return (hidden, rotary_angles(position_ids[0], self.spec.rope, self.spec.head_dim), *rest)

    def _without_padding(self, hidden: torch.Tensor, length: int, padding: int) -> torch.Tensor:
        """Zero for tokens that only pad, and so zero in every layer: they must not widen the range of an FP8 scale."""
        keep = hidden.new_ones(length, 1, 1)
        keep[length - padding :] = 0
        if self.config.sequence_parallel:
            keep = scatter_to_sequence_parallel_region(keep, group=self.groups.tp)
        return hidden * keep

    def forward(self, layout: Layout) -> torch.Tensor:  # type: ignore[override]
        where = platform.device()
        return super().forward(
            input_ids=torch.from_numpy(layout.tokens_S)[None].to(where),
            position_ids=torch.from_numpy(layout.positions_S)[None].to(where),
            attention_mask=None,
            packed_seq_params=LayoutParams(layout),
            output_processor=lambda hidden_states, **_: hidden_states,
        )

    def tie_embeddings_and_output_weights_state_dict(
        self, described: Any, output_key: str, embedding_key: str, metadata: Any = None
    ) -> None:
        """In a checkpoint the last stage's tied head is one more copy of the embedding.

        Megatron's own form asks its global state for the data-parallel rank.
        """
        if self.post_process and not self.pre_process:
            group = self.groups.dp_cp
            described[output_key] = make_tp_sharded_tensor_for_checkpoint(
                tensor=self.shared_embedding_or_output_weight(),
                key=embedding_key,
                replica_id=(1, 0, group.rank()),
                allow_shape_mismatch=True,
                tp_group=self.groups.tp,
                dp_cp_group=group,
            )


def _with_plain_strides(hidden: torch.Tensor) -> torch.Tensor:
    """The same `[s, 1, h]` with the strides that a new tensor of this shape would have.

    Megatron turns the embedding's `[1, s, h]` by `transpose(0, 1).contiguous()`, which for one sequence copies nothing
    and leaves an odd stride on the axis of length 1. The first layer's norm keeps it, and `torch.matmul` then takes the
    product for one of s batches of a single token: many times slower, and in bfloat16 on a CPU with s copies of the
    weight.
    """
    return hidden.squeeze(1).unsqueeze(1)


class Decoder(torch.nn.Module):
    """All that this rank holds of a model."""

    def __init__(self, spec: ModelSpec, config: TransformerConfig, groups: Groups, layers: Any) -> None:
        super().__init__()
        self.spec, self.config, self.groups = spec, config, groups
        self.parts: Any = torch.nn.ModuleList(
            Part(spec, config, groups, layers, number)
            for number in range(config.virtual_pipeline_model_parallel_size or 1)
        )

    def sharded_state_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Megatron's, under the names that `load_state_dict` takes; in the checkpoint no name tells of parts."""
        return {
            f"parts.{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part.sharded_state_dict(**kwargs).items()
        }

    def head(self) -> HeadShard:
        """This rank's shard of the output head, for the heads to multiply with. The last stage has it."""
        assert self.groups.grid.last_stage
        last = self.parts[-1]
        weight = last.shared_embedding_or_output_weight() if self.spec.tied else last.output_layer.weight
        return HeadShard(weight, *self.spec.vocabulary_shard(self.groups.grid.coordinate("tp"), self.groups.grid.tp))


def build_decoder(spec: ModelSpec, *, groups: Groups, options: BuildOptions, meta: bool = False) -> Decoder:
    """A decoder with uninitialised weights on this rank's device; with `meta`, with shapes and no weights at all."""
    grid = groups.grid
    axes = Axes(
        tp=grid.tp,
        dp=grid.dp,
        pp=grid.pp,
        vpp=options.vpp,
        ep=grid.ep,
        etp=grid.etp,
        sequence_parallel=options.sequence_parallel,
    )
    problems = layout_problems(spec, axes)
    if options.offload_layers >= spec.num_layers:
        problems.append(f"offload_layers={options.offload_layers}: the last of the {spec.num_layers} layers stays")
    if problems:
        raise LayoutError(listing(f"{spec.architecture} does not fit the layout:", problems))
    layers = choose_layers(options.layers, options.fp8, options.offload_layers)
    config = megatron_config(spec, grid, options, layers)
    if meta:
        config.use_cpu_initialization = True  # on the device of the context, not on one that Megatron names
        with torch.device("meta"):
            return Decoder(spec, config, groups, layers)
    decoder = Decoder(spec, config, groups, layers).to(platform.device())
    dropouts = [module.p for module in decoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert not any((config.attention_dropout, config.hidden_dropout, *dropouts)), "log-probs must be those of a rollout"
    return decoder


def local_parameters(decoder: Decoder) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters under Megatron's names, with the global numbers of layers and experts.

    A tied model's last stage has a copy of the embedding where its head would be: it goes by the embedding's name.
    Grouped experts are named as single ones are.
    """
    spec, grid = decoder.spec, decoder.groups.grid
    first_expert = grid.coordinate("ep") * (spec.num_experts // grid.ep)
    named = {}
    for part in decoder.parts:
        for name, parameter in part.named_parameters():
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                words[2] = str(part.decoder.layers[int(words[2])].layer_number - 1)
            if "experts" in words and words[-1] != "weight":  # ... experts.linear_fc1.weight3
                at = words.index("experts") + 1
                words[at:] = ["local_experts", words[-1].removeprefix("weight"), words[at], "weight"]
            if "local_experts" in words:
                at = words.index("local_experts") + 1
                words[at] = str(int(words[at]) + first_expert)
            if words[0] == "output_layer" and spec.tied:
                words = ["embedding", "word_embeddings", "weight"]
            named[".".join(words)] = parameter
    return named

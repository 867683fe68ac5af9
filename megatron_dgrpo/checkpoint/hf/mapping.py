"""The table between Hugging Face tensors and Megatron-Core parameters.

A rule says where the rows (or columns) of one Hugging Face tensor lie in one Megatron parameter. Megatron fuses and
interleaves: `linear_qkv` holds, for each key-value head, its query heads, then its key, then its value; `linear_fc1`
holds, on every tensor-parallel rank, that rank's part of the gate above that rank's part of the up-projection. Either
way a tensor-parallel shard of the parameter consists of runs of consecutive rows of Hugging Face tensors, and those
runs, `Span`s, are all that import, export and weight transfer need to know. They hold for any tensor-parallel size,
also one that cuts a key-value head's rows in two.

Parameters carry Megatron's names with global numbers of layers and experts. Where a parameter is (pipeline stage,
expert rank) is thus said by its name alone, and a rank that lacks it has no part of the rule; spans only cut along the
tensor-parallel axis, which for experts is an axis of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron_dgrpo.model.spec import ModelSpec

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


class Place(Protocol):
    """A rank's place in a model's layout (`parallel.groups.Grid`)."""

    def coordinate(self, axis: str, /) -> int: ...

    def length(self, axis: str, /) -> int: ...


class Span(NamedTuple):
    """`length` consecutive indices of the cut axis: from `local` on in the shard, from `hf` on in the whole tensor."""

    local: int
    hf: int
    length: int


@dataclass(frozen=True)
class Rule:
    hf_name: str
    hf_shape: tuple[int, ...]
    parameter: str
    """Megatron's name, with the global number of the layer, and of the expert."""
    axis: int | None
    """Axis along which tensor parallelism cuts; None: every rank holds the whole."""
    spans: Callable[[int, int], list[Span]]
    """(tensor-parallel rank, size) -> the runs that this rank holds, in the order of the Hugging Face tensor."""
    expert: bool = False
    """It is cut over the tensor-parallel ranks of the experts."""

    def held(self, place: Place) -> list[Span]:
        """The runs on a rank that has the parameter."""
        axis = "etp" if self.expert else "tp"
        return self.spans(place.coordinate(axis), place.length(axis))

    def answers(self, place: Place) -> bool:
        """Whether this rank, among all that hold the same part of the parameter, is the one that hands it out."""
        if self.expert:
            return place.coordinate("edp") == 0
        first = place.coordinate("dp") == 0 and place.coordinate("cp") == 0
        if self.parameter == EMBEDDING and place.coordinate("pp") != 0:
            return False  # a tied model's last stage has a copy
        return first and (self.axis is not None or place.coordinate("tp") == 0)


def _whole(length: int) -> Callable[[int, int], list[Span]]:
    return lambda rank, size: [Span(0, 0, length)]


def _even(length: int, padded: Callable[[int], int] | None = None) -> Callable[[int, int], list[Span]]:
    """An even cut; with `padded`, of a longer axis whose end belongs to no Hugging Face tensor."""

    def spans(rank: int, size: int) -> list[Span]:
        per_rank = (padded(size) if padded else length) // size
        held = min(per_rank, length - rank * per_rank)
        return [Span(0, rank * per_rank, held)] if held > 0 else []

    return spans


def _fused_halves(length: int, half: int) -> Callable[[int, int], list[Span]]:
    """One of two equally long tensors, the first of which lies above the second on every rank."""
    return lambda rank, size: [Span(half * (length // size), rank * (length // size), length // size)]


def _interleaved(blocks: list[tuple[int, int, int]], total: int) -> Callable[[int, int], list[Span]]:
    """Blocks (row in the Megatron parameter, row in the Hugging Face tensor, length) of an evenly cut parameter."""

    def spans(rank: int, size: int) -> list[Span]:
        start, stop = rank * (total // size), (rank + 1) * (total // size)
        found = []
        for row, hf, length in blocks:
            first, last = max(row, start), min(row + length, stop)
            if first < last:
                found.append(Span(first - start, hf + first - row, last - first))
        return found

    return spans


def _qkv_rules(spec: ModelSpec, hf: str, parameter: str) -> Iterator[Rule]:
    d, groups, per_group = spec.head_dim, spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
    stride, total = (per_group + 2) * d, (spec.num_heads + 2 * groups) * d
    layout = {
        "q_proj": (spec.num_heads * d, [(g * stride, g * per_group * d, per_group * d) for g in range(groups)]),
        "k_proj": (groups * d, [(g * stride + per_group * d, g * d, d) for g in range(groups)]),
        "v_proj": (groups * d, [(g * stride + (per_group + 1) * d, g * d, d) for g in range(groups)]),
    }
    for name, (rows, blocks) in layout.items():
        cut = _interleaved(blocks, total)
        yield Rule(f"{hf}.{name}.weight", (rows, spec.hidden_size), f"{parameter}.weight", 0, cut)
        if spec.qkv_bias:
            yield Rule(f"{hf}.{name}.bias", (rows,), f"{parameter}.bias", 0, cut)


def _mlp_rules(spec: ModelSpec, hf: str, own: str, expert: bool) -> Iterator[Rule]:
    h, f = spec.hidden_size, spec.ffn_size
    for half, name in enumerate(("gate_proj", "up_proj")):
        yield Rule(f"{hf}.{name}.weight", (f, h), f"{own}.linear_fc1.weight", 0, _fused_halves(f, half), expert)
    yield Rule(f"{hf}.down_proj.weight", (h, f), f"{own}.linear_fc2.weight", 1, _even(f), expert)


def _layer_rules(spec: ModelSpec, layer: int) -> Iterator[Rule]:
    hf, own = f"model.layers.{layer}", f"decoder.layers.{layer}"
    h, attention = spec.hidden_size, spec.num_heads * spec.head_dim

    def norm(hf_name: str, parameter: str, length: int) -> Rule:
        return Rule(f"{hf}.{hf_name}.weight", (length,), f"{own}.{parameter}.weight", None, _whole(length))

    yield norm("input_layernorm", "input_layernorm", h)
    yield from _qkv_rules(spec, f"{hf}.self_attn", f"{own}.self_attention.linear_qkv")
    if spec.qk_norm:
        yield norm("self_attn.q_norm", "self_attention.q_layernorm", spec.head_dim)
        yield norm("self_attn.k_norm", "self_attention.k_layernorm", spec.head_dim)
    proj = f"{own}.self_attention.linear_proj.weight"
    yield Rule(f"{hf}.self_attn.o_proj.weight", (h, attention), proj, 1, _even(attention))
    yield norm("post_attention_layernorm", "pre_mlp_layernorm", h)
    if not spec.num_experts:
        yield from _mlp_rules(spec, f"{hf}.mlp", f"{own}.mlp", expert=False)
        return
    experts = spec.num_experts
    yield Rule(f"{hf}.mlp.gate.weight", (experts, h), f"{own}.mlp.router.weight", None, _whole(experts))
    for e in range(experts):
        yield from _mlp_rules(spec, f"{hf}.mlp.experts.{e}", f"{own}.mlp.experts.local_experts.{e}", expert=True)


def rules(spec: ModelSpec) -> list[Rule]:
    """Every tensor of the model, in the order in which it is imported, exported and transferred."""
    vocab, h = spec.vocab_size, spec.hidden_size
    table = [
        Rule(
            "model.embed_tokens.weight",
            (vocab, h),
            EMBEDDING,
            0,
            _even(vocab, spec.padded_vocab_size),
        )
    ]
    for layer in range(spec.num_layers):
        table.extend(_layer_rules(spec, layer))
    table.append(Rule("model.norm.weight", (h,), "decoder.final_layernorm.weight", None, _whole(h)))
    if not spec.tied:
        table.append(Rule("lm_head.weight", (vocab, h), HEAD, 0, _even(vocab, spec.padded_vocab_size)))
    return table

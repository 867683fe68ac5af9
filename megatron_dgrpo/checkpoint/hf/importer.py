"""Hugging Face safetensors into each rank's shard. No rank ever holds more than its shard and a small buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.hf.headers import EMBEDDING, HEAD, check_tensors, read_headers
from megatron_dgrpo.checkpoint.hf.mapping import Rule, rules
from megatron_dgrpo.checkpoint.hf.safetensors_folder import SafetensorsFolder
from megatron_dgrpo.errors import ConversionError
from megatron_dgrpo.model.decoder import Decoder, local_parameters
from megatron_dgrpo.model.spec import ModelSpec

_BLOCK_VALUES = 1 << 20
"""Of the tensors that are compared: so many at a time."""


class Part(NamedTuple):
    """What this rank holds of a Hugging Face tensor: `tensor` is a view of a parameter, the part `box` of it."""

    rule: Rule
    box: tuple[tuple[int, int], ...]
    tensor: torch.Tensor


def local_parts(decoder: Decoder) -> Iterator[Part]:
    """All that this rank holds, replicated or not, in the order of the table."""
    grid, parameters = decoder.groups.grid, local_parameters(decoder)
    for rule in rules(decoder.spec):
        if rule.parameter in parameters:
            for span in rule.held(grid):
                view = parameters[rule.parameter].detach().narrow(rule.axis or 0, span.local, span.length)
                yield Part(rule, box_of(rule, span.hf, span.length), view)


def zero_padding(decoder: Decoder) -> None:
    """Zero what belongs to no Hugging Face tensor: rows that pad the vocabulary."""
    grid, parameters = decoder.groups.grid, local_parameters(decoder)
    held: dict[str, list[tuple[int, int]]] = {}
    axes: dict[str, int] = {}
    for rule in rules(decoder.spec):
        axes[rule.parameter] = rule.axis or 0
        for span in rule.held(grid):
            held.setdefault(rule.parameter, []).append((span.local, span.local + span.length))
    for name, parameter in parameters.items():
        assert name in axes, f"no rule of the table fills {name}"
        length, end = parameter.shape[axes[name]], 0
        for start, stop in [*sorted(held.get(name, [])), (length, length)]:
            parameter.detach().narrow(axes[name], end, start - end).zero_()
            end = stop


@torch.no_grad()
def import_weights(decoder: Decoder, folder: str | Path, *, advance: Callable[[int], None] | None = None) -> None:
    """Fill a decoder from a Hugging Face folder, in the decoder's own type. Every rank of the model calls it.

    `advance` is told of the bytes of each part that has been filled.
    """
    with agreed(decoder.groups.world):
        headers = check_tensors(folder, rules(decoder.spec), decoder.spec)
        zero_padding(decoder)
        with SafetensorsFolder(headers) as files:
            if decoder.spec.tied and HEAD in headers and dist.get_rank(decoder.groups.world) == 0:
                _check_tied_head(files, decoder.spec)
            for part in local_parts(decoder):
                files.read_into(part.rule.hf_name, part.box, part.tensor)
                if advance is not None:
                    advance(part.tensor.numel() * part.tensor.element_size())


def _check_tied_head(files: SafetensorsFolder, spec: ModelSpec) -> None:
    """A file may hold a tied head once more. With other values the model is not tied, whatever its config.json says."""
    num_rows = max(1, _BLOCK_VALUES // spec.hidden_size)
    for first in range(0, spec.vocab_size, num_rows):
        box = (first, min(first + num_rows, spec.vocab_size)), (0, spec.hidden_size)
        if not torch.equal(files.read(HEAD, box).double(), files.read(EMBEDDING, box).double()):
            raise ConversionError(
                f"{HEAD} and {EMBEDDING} have different values, and config.json makes them one "
                "(tie_word_embeddings=true): set it to false where the head is the model's, or remove the head"
            )


def box_of(rule: Rule, start: int, length: int) -> tuple[tuple[int, int], ...]:
    """The part of a tensor that a span stands for."""
    cut = rule.axis or 0
    return tuple((start, start + length) if axis == cut else (0, size) for axis, size in enumerate(rule.hf_shape))


def read_head(folder: str | Path, spec: ModelSpec, start: int, target: torch.Tensor) -> None:
    """Fill `target` with the rows of the output head from `start` on, wherever a tied or untied model keeps it."""
    name = EMBEDDING if spec.tied else HEAD
    with SafetensorsFolder(read_headers(folder)) as files:
        files.read_into(name, ((start, start + len(target)), (0, spec.hidden_size)), target)

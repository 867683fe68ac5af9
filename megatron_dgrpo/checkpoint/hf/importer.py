"""Hugging Face safetensors into each rank's shard. No rank ever holds more than its shard and one tensor's part."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_dgrpo.checkpoint.hf.headers import check_tensors, read_headers
from megatron_dgrpo.checkpoint.hf.mapping import EMBEDDING, HEAD, Rule, rules
from megatron_dgrpo.checkpoint.hf.safetensors_folder import SafetensorsFolder
from megatron_dgrpo.model.decoder import Decoder, local_parameters
from megatron_dgrpo.model.spec import ModelSpec


@torch.no_grad()
def import_weights(decoder: Decoder, folder: str | Path) -> None:
    """Fill a decoder from a Hugging Face folder, in the decoder's own type."""
    table, parameters = rules(decoder.spec), local_parameters(decoder)
    with SafetensorsFolder(check_tensors(folder, table, decoder.spec)) as files:
        for name in (EMBEDDING, HEAD):
            if name in parameters:
                parameters[name].zero_()  # rows that pad the vocabulary belong to no tensor of the folder
        for rule in table:
            if rule.parameter not in parameters:
                continue
            for span in rule.held(decoder.groups.grid):
                part = files.read(rule.hf_name, box_of(rule, span.hf, span.length))
                target = parameters[rule.parameter].narrow(rule.axis or 0, span.local, span.length)
                target.copy_(part)


def box_of(rule: Rule, start: int, length: int) -> tuple[tuple[int, int], ...]:
    """The part of a tensor that a span stands for."""
    cut = rule.axis or 0
    return tuple((start, start + length) if axis == cut else (0, size) for axis, size in enumerate(rule.hf_shape))


def read_head(folder: str | Path, spec: ModelSpec, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows `start` to `stop` of the output head, wherever a tied or untied model keeps it."""
    name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    with SafetensorsFolder(read_headers(folder)) as files:
        return files.read(name, ((start, stop), (0, spec.hidden_size))).to(dtype)

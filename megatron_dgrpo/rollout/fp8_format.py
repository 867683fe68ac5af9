"""What FP8 weights of an engine are: which tensors, in which blocks, under which names. Imports neither torch nor vLLM.

The format is that of DeepSeek's and Qwen3's FP8 checkpoints. The weight of every linear layer inside a decoder layer is
float8_e4m3fn; for each block of 128 x 128 of its elements there is one float32, in a tensor beside it:

    X.weight            [N, K]                          q
    X.weight_scale_inv  [ceil(N / 128), ceil(K / 128)]  s, despite its name what q is multiplied by: w = q s

Embeddings, the head, norms, biases and the routers of experts stay as they are: vLLM quantises none of them. Which of
an engine's parameters are FP8 is the engine's own matter and is checked there, tensor by tensor, before a byte moves
(`fp8_loading`); the rule here only says what the trainer offers.

vLLM cuts and fuses these tensors and their scales alike, so on every rank of an engine each part of a fused layer has
to consist of whole blocks. Where it does not, vLLM refuses, or reads the scale of another block; the launcher says so
before (`launch.preflight`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BLOCK = 128
SCALE = "_scale_inv"
WEIGHT_DTYPE, SCALE_DTYPE = "float8_e4m3fn", "float32"


def is_quantised(name: str, shape: Sequence[int]) -> bool:
    """Whether a checkpoint's tensor is the weight of a linear layer that engines have in FP8."""
    return name.endswith("_proj.weight") and len(shape) == 2


def num_blocks(length: int) -> int:
    """Along an axis; the last may be smaller than the others."""
    return -(-length // BLOCK)


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(num_blocks(length) for length in shape)


def quantisation_config(names: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json, for a model with these tensors."""
    routers = [name.removesuffix(".weight") for name in names if name.endswith(".mlp.gate.weight")]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [*routers, "lm_head"],
    }


def with_scales(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of an FP8 model, by those of its checkpoint, which may have scales or have none."""
    found = dict(shapes)
    for name, shape in shapes.items():
        if is_quantised(name, shape):
            found[name + SCALE] = scale_shape(shape)
    return found


def weight_bytes(tensors: Iterable[tuple[str, Sequence[int]]], bytes_per_number: int) -> int:
    """Of a model with these tensors: FP8 weights, their scales, and what stays as it is."""
    total = 0
    for name, shape in tensors:
        if is_quantised(name, shape):
            total += math.prod(shape) + 4 * math.prod(scale_shape(shape))
        else:
            total += math.prod(shape) * bytes_per_number
    return total

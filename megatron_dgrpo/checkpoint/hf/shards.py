"""How weights leave a sharded model: tensor by tensor in Hugging Face names, each rank with the boxes that it holds."""

from __future__ import annotations

from typing import NamedTuple

import torch


class WeightSpec(NamedTuple):
    """One tensor of the whole model."""

    hf_name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype


class WeightShard(NamedTuple):
    """What one rank holds of one tensor: `local_tensor` is the part `box` of it, (start, stop) on every axis.

    With `scales`, those of all blocks of the whole tensor, `dtype` is FP8 and `local_tensor` what it is made of
    (`rollout.fp8`)."""

    hf_name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    box: tuple[tuple[int, int], ...]
    local_tensor: torch.Tensor
    scales: torch.Tensor | None = None

"""Rotary frequencies from explicit positions.

Frequencies and angles are float32 products, as in Hugging Face and vLLM, whatever the model's type: at positions of
1e5 a more precise angle would differ from theirs by 1e-2, and training must see the angles that the rollout saw.
"""

from __future__ import annotations

import torch

from megatron_dgrpo.model.spec import Rope


def rotary_angles(positions_S: torch.Tensor, rope: Rope, head_dim: int) -> torch.Tensor:
    """Angles [S, 1, 1, head_dim] in the form that Megatron's attention takes: one for each half of the head."""
    index = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions_S.device).float()
    frequency = 1.0 / (rope.base ** (index / head_dim))
    angles = positions_S.float()[:, None] * frequency
    return torch.cat([angles, angles], -1)[:, None, None, :]

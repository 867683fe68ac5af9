"""Rotary frequencies from explicit positions.

Frequencies and angles are float32 products, as in Hugging Face and vLLM, whatever the model's type: at positions of
1e5 a more precise angle would differ from theirs by 1e-2, and training must see the angles that the rollout saw. For
the same reason the stretched frequencies are formed by the same operations in the same order as there.

Legend: _S tokens, _F frequencies (half of the head's dimension).
"""

from __future__ import annotations

import math

import torch

from megatron_dgrpo.model.spec import Rope


def rotary_angles(positions_S: torch.Tensor, rope: Rope, head_dim: int) -> torch.Tensor:
    """Angles [S, 1, 1, head_dim] in the form that Megatron's attention takes: one for each half of the head."""
    angles = positions_S.float()[:, None] * frequencies(rope, head_dim).to(positions_S.device)
    return torch.cat([angles, angles], -1)[:, None, None, :]


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    index_F = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    wave_F = rope.base ** (index_F / head_dim)
    match rope.kind:
        case "default":
            return 1.0 / wave_F
        case "llama3":
            return _llama3(1.0 / wave_F, rope)
        case "yarn":
            return _yarn(wave_F, rope, head_dim)


def _llama3(frequency_F: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Long wavelengths are stretched, short ones are not, those between are interpolated."""
    wavelength_F = 2 * math.pi / frequency_F
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    stretched_F = torch.where(wavelength_F > longest, frequency_F / rope.factor, frequency_F)
    smooth_F = (rope.original_max_positions / wavelength_F - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between_F = (1 - smooth_F) * stretched_F / rope.factor + smooth_F * stretched_F
    return torch.where((wavelength_F >= shortest) & (wavelength_F <= longest), between_F, stretched_F)


def _yarn(wave_F: torch.Tensor, rope: Rope, head_dim: int) -> torch.Tensor:
    """Dimensions are stretched by how often they turn in the original context, along a ramp between two bounds."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in both libraries: the ramp is a step then
    kept_F = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * wave_F) * (1 - kept_F) + 1.0 / wave_F * kept_F

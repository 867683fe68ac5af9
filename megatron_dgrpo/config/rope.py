"""Rotary embeddings of the config's choice: as they are, or stretched to a longer context."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import Frozen


class DefaultRope(Frozen):
    """Rotary embeddings as they are, without any stretching."""

    kind: Literal["default"]
    base: PositiveFloat | None = None
    """The model's own where none is given (rope_theta)."""


class YarnRope(Frozen):
    """YaRN: a context of factor x original_max_positions."""

    kind: Literal["yarn"]
    factor: Annotated[float, Field(ge=1)]
    """By what the context grows."""
    original_max_positions: PositiveInt
    """Context that the model was trained with."""
    base: PositiveFloat | None = None
    """The model's own where none is given (rope_theta)."""
    beta_fast: PositiveFloat = 32.0
    """Dimensions that turn more often than this in the original context stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Dimensions that turn less often than this in the original context are stretched in full."""
    attention_factor: PositiveFloat | None = None
    """Multiplies cosine and sine; 0.1 ln(factor) + 1 where none is given."""


class Llama3Rope(Frozen):
    """Llama 3's way to a context of factor x original_max_positions."""

    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)]
    """By what the context grows."""
    original_max_positions: PositiveInt
    """Context that the model was trained with."""
    base: PositiveFloat | None = None
    """The model's own where none is given (rope_theta)."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above original_max_positions / low_freq_factor are stretched in full."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below original_max_positions / high_freq_factor stay as they are."""


RopeScaling = DefaultRope | YarnRope | Llama3Rope

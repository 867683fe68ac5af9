"""Coefficients of an objective's terms: schedules over the steps of a stage, or numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import Frozen


class Constant(Frozen):
    """The same number at every step; writing the number alone means this."""

    kind: Literal["constant"] = "constant"
    value: NonNegativeFloat


class Linear(Frozen):
    """Along a straight line, then constant."""

    kind: Literal["linear"] = "linear"
    start: NonNegativeFloat
    """At the stage's first step."""
    end: NonNegativeFloat
    """After `steps` more, and from there."""
    steps: PositiveInt
    """Steps of the stage from start to end."""


class Cosine(Frozen):
    """Along half a cosine, then constant."""

    kind: Literal["cosine"] = "cosine"
    start: NonNegativeFloat
    """At the stage's first step."""
    end: NonNegativeFloat
    """After `steps` more, and from there."""
    steps: PositiveInt
    """Steps of the stage from start to end."""


class Adaptive(Frozen):
    """Follows the divergence: multiplied after each step by 1 + rate x error, the error being divergence / target - 1
    within +-max_error. Above the target it grows."""

    kind: Literal["adaptive"] = "adaptive"
    initial: PositiveFloat
    """At the stage's first step."""
    target: PositiveFloat
    """The divergence to aim at: the step's mean over loss tokens of what the estimator reports."""
    rate: PositiveFloat = 0.1
    """How fast it follows."""
    max_error: PositiveFloat = 0.2
    """The relative error of one step counts no more than this."""
    low: PositiveFloat = 1e-4
    """It never falls below this."""
    high: PositiveFloat = 1e2
    """It never rises above this."""


def _constant(value: Any) -> Any:
    if isinstance(value, dict | Frozen):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{value!r} should be a number, 0 or more, or a mapping with a kind (a schedule)")
    return {"kind": "constant", "value": value}


Schedule = Annotated[Constant | Linear | Cosine, Field(discriminator="kind"), BeforeValidator(_constant)]
AdaptiveSchedule = Annotated[
    Constant | Linear | Cosine | Adaptive, Field(discriminator="kind"), BeforeValidator(_constant)
]


def always_zero(schedule: Constant | Linear | Cosine | Adaptive) -> bool:
    match schedule:
        case Constant(value=value):
            return value == 0
        case Linear(start=start, end=end) | Cosine(start=start, end=end):
            return start == end == 0
    return False

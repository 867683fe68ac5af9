"""The optimizer's section of a stage, and the learning rate as a function of the update.

With W warm-up updates of U in all, update u (from 1) has the learning rate

    lr x u / W                                                  u <= W
    lr x (floor + (1 - floor) x shape((u - 1 - S) / (U - S)))   after that

where the shape falls from 1 to 0: linear 1 - p, cosine (1 + cos(pi p)) / 2, sqrt 1 - sqrt(p). Decay begins after S = W
updates, or, of `wsd`, with the last `decay_steps` ones (S = U - decay_steps; constant before). The floor is where the
curve would arrive one update after the last, so that with a floor of 0 the last update still learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import Frozen

Shape = Literal["linear", "cosine", "sqrt"]
Floor = Annotated[float, Field(ge=0, le=1)]


class ConstantRate(Frozen):
    """The same from the warm-up on."""

    kind: Literal["constant"] = "constant"


class LinearRate(Frozen):
    """Down a straight line from the warm-up to the stage's end."""

    kind: Literal["linear"] = "linear"
    floor: Floor = 0.0
    """Where it ends, as a share of lr."""


class CosineRate(Frozen):
    """Down half a cosine from the warm-up to the stage's end."""

    kind: Literal["cosine"] = "cosine"
    floor: Floor = 0.0
    """Where it ends, as a share of lr."""


class WSDRate(Frozen):
    """Warm-up, stable, decay: the same from the warm-up on, and down over the stage's last updates."""

    kind: Literal["wsd"] = "wsd"
    decay_steps: PositiveInt
    """The last so many updates."""
    shape: Shape = "linear"
    """How it falls: linear, cosine, or 1 - sqrt of the decay's part that is over."""
    floor: Floor = 0.0
    """Where it ends, as a share of lr."""


def _schedule(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


RateSchedule = Annotated[
    ConstantRate | LinearRate | CosineRate | WSDRate, Field(discriminator="kind"), BeforeValidator(_schedule)
]


class PrecisionAware(Frozen):
    """State of the optimizer in fewer bits (Transformer Engine's FusedAdam, on GPUs)."""

    main_params: Literal["float32", "float16"] = "float32"
    """Type of the master weights."""
    exp_avg: Literal["float32", "float16", "bfloat16", "uint8"] = "float32"
    """Type of the first moments (uint8: FP8 with scales)."""
    exp_avg_sq: Literal["float32", "float16", "bfloat16", "uint8"] = "float32"
    """Type of the second moments (uint8: FP8 with scales)."""


class Adam(Frozen):
    """Megatron's distributed AdamW; norms and biases do not decay."""

    lr: NonNegativeFloat
    """Largest learning rate, which the warm-up ends at."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""
    schedule: RateSchedule = ConstantRate()
    """The learning rate after the warm-up, over the stage's updates: constant, linear, cosine or wsd; a kind's name
    alone, or a mapping with its settings."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_grad: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    precision_aware: PrecisionAware | None = None
    """State in fewer bits (none: float32)."""
    cpu_offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """This share of the optimizer's state, and its updates, in the host's memory (needs a GPU)."""


def rate(settings: Adam, update: int, num_updates: int) -> float:
    """The learning rate of an update, which counts from 1, of so many."""
    if update <= settings.warmup_steps:
        return settings.lr * update / settings.warmup_steps
    match settings.schedule:
        case ConstantRate():
            return settings.lr
        case LinearRate(floor=floor):
            shape: Shape = "linear"
            start = settings.warmup_steps
        case CosineRate(floor=floor):
            shape, start = "cosine", settings.warmup_steps
        case WSDRate(floor=floor, shape=shape, decay_steps=decay):
            start = max(settings.warmup_steps, num_updates - decay)
    part = min(1.0, max(0.0, (update - 1 - start) / max(1, num_updates - start)))
    left = {"linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2, "sqrt": 1 - math.sqrt(part)}[shape]
    return settings.lr * (floor + (1 - floor) * left)


def problems(settings: Adam, num_updates: int | None) -> Iterator[str]:
    """What is contradictory; each begins with the key, relative to the optimizer's section. The number of updates is
    None where only the data say it."""
    for j, beta in enumerate(settings.betas):
        if not 0 <= beta < 1:
            yield f"betas.{j}: {beta} is not in [0, 1); 0.9 and 0.95 are usual"
    if not num_updates or isinstance(settings.schedule, ConstantRate):
        return
    decay = settings.schedule.decay_steps if isinstance(settings.schedule, WSDRate) else 1
    if settings.warmup_steps + decay > num_updates:
        of_decay = f" and {decay} of decay" if isinstance(settings.schedule, WSDRate) else ""
        yield (
            f"schedule: {settings.warmup_steps} updates of warm-up{of_decay} are more than the stage's {num_updates}; "
            "shorten them, or set schedule=constant"
        )

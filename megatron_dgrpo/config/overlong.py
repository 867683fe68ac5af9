"""What becomes of responses that were cut off at `sampling.max_tokens`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import Frozen


class Keep(Frozen):
    """They count as all others do."""

    kind: Literal["keep"] = "keep"


class MaskSurrogate(Frozen):
    """The surrogate leaves their tokens out: nothing is learnt from their rewards, and the other terms go on."""

    kind: Literal["mask_surrogate"] = "mask_surrogate"


class Mask(Frozen):
    """Every term leaves their tokens out. Their rewards still count in the mean and deviation of their group."""

    kind: Literal["mask"] = "mask"


class Penalise(Frozen):
    """Rewards fall along a line over the last `cache` tokens before max_tokens (DAPO's soft punishment)."""

    kind: Literal["penalise"] = "penalise"
    cache: PositiveInt
    """Tokens before max_tokens over which the penalty grows from 0."""
    penalty: PositiveFloat = 1.0
    """What a response of max_tokens loses of its reward."""


def _kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Overlong = Annotated[Keep | MaskSurrogate | Mask | Penalise, Field(discriminator="kind"), BeforeValidator(_kind)]
TaughtOverlong = Annotated[Keep | Mask, Field(discriminator="kind"), BeforeValidator(_kind)]

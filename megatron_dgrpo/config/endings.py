"""What a stage does about updates that are not finite, and which figures end it before its last step."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from megatron_dgrpo.config.frozen import Frozen


class StopOnNonFinite(Frozen):
    """The run ends before the update."""

    kind: Literal["stop"] = "stop"


class SkipNonFinite(Frozen):
    """The update is left out: weights and the optimizer's state stay as they are to the bit, the count of steps and the
    learning rate's schedule go on. Counted as skipped_steps."""

    kind: Literal["skip"] = "skip"
    in_a_row: PositiveInt = 10
    """So many skipped updates in a row end the run."""


def _kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class StopWhen(Frozen):
    """A figure that ends the stage."""

    metric: str
    """Its name in metrics.jsonl: heldout/reward, for example. Steps without it are passed over."""
    above: float | None = None
    """The figure has to be above this."""
    below: float | None = None
    """Or below this."""
    in_a_row: PositiveInt = 1
    """So many figures one after another: evaluations for heldout/*, updates for the others."""


OnNonFinite = Annotated[StopOnNonFinite | SkipNonFinite, Field(discriminator="kind"), BeforeValidator(_kind)]


def _one(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, dict) else value


StopConditions = Annotated[tuple[StopWhen, ...], BeforeValidator(_one)]

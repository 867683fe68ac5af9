"""Limits of the mismatch between the trainer's and the rollout engine's log-probs of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import PositiveFloat

from megatron_dgrpo.config.frozen import Frozen


class Figures(Frozen):
    """Limits; what has none is not looked at. d is the trainer's log-prob minus the engine's."""

    abs: PositiveFloat | None = None
    """Of the mean of |d|."""
    p99: PositiveFloat | None = None
    """Of the 99th percentile of |d|."""
    max: PositiveFloat | None = None
    """Of the largest |d|."""
    k3: PositiveFloat | None = None
    """Of the mean of exp(d) - 1 - d, an estimate of KL(engine || trainer)."""
    outside: PositiveFloat | None = None
    """Of the share of the tokens whose exp(d) is out of [0.5, 2]."""


class Mismatch(Frozen):
    """What is done about the mismatch of an update's batch, before the update."""

    warn: Figures = Figures(k3=0.01, outside=0.01)
    """Above any of these, a warning says so."""
    stop: Figures = Figures()
    """Above any of these, the run ends and no weight is changed."""


def problems(mismatch: Mismatch) -> Iterator[str]:
    """What is contradictory; each begins with the key, relative to the section."""
    stop = mismatch.stop.model_dump(exclude_none=True)
    for name, limit in mismatch.warn.model_dump(exclude_none=True).items():
        if name in stop and "warn" in mismatch.model_fields_set and limit > stop[name]:
            yield f"warn.{name}: {limit:g} is above stop.{name}={stop[name]:g}, so that it never warns; lower it"

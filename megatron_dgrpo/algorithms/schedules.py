"""Schedules of a term's factor over the steps of a stage. Imports no torch.

A step counts from 0. All but the adaptive one are functions of the step alone; that one follows what it observes, and
its state belongs into a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from megatron_dgrpo.errors import ConfigError, ObjectiveError, listing


class Schedule(Protocol):
    def value(self, step: int) -> float: ...

    def observe(self, divergence: float) -> None:
        """The batch's mean divergence, the same on every rank; after the step's update."""

    def state(self) -> dict[str, float]: ...

    def load(self, state: dict[str, float]) -> None: ...


class _Stateless:
    def observe(self, divergence: float) -> None:
        pass

    def state(self) -> dict[str, float]:
        return {}

    def load(self, state: dict[str, float]) -> None:
        if state:
            raise ConfigError(
                f"a {type(self).__name__.lower()} schedule has no state, but the checkpoint holds {sorted(state)}: it"
                " was saved with another schedule; resume with that one"
            )


@dataclass(frozen=True)
class Constant(_Stateless):
    level: float

    def value(self, step: int) -> float:
        return self.level


@dataclass(frozen=True)
class Linear(_Stateless):
    """From `start` at step 0 to `end` at step `steps`, and `end` from there."""

    start: float
    end: float
    steps: int

    def value(self, step: int) -> float:
        done = _progress(step, self.steps)
        return self.start * (1 - done) + self.end * done


@dataclass(frozen=True)
class Cosine(_Stateless):
    """From `start` at step 0 to `end` at step `steps` along half a cosine, and `end` from there."""

    start: float
    end: float
    steps: int

    def value(self, step: int) -> float:
        done = (1 - math.cos(math.pi * _progress(step, self.steps))) / 2
        return self.start * (1 - done) + self.end * done


@dataclass
class AdaptiveKL:
    """Multiplied after each step by 1 + rate x error, error = divergence / target - 1 held within +-max_error.

    Above the target the factor grows and pulls harder. It stays within [low, high].
    """

    initial: float
    target: float
    rate: float = 0.1
    max_error: float = 0.2
    low: float = 1e-4
    high: float = 1e2
    _level: float = field(init=False)

    def __post_init__(self) -> None:
        problems = []
        if not self.target > 0:
            problems.append(f"target is {self.target}: a divergence to aim at is above 0")
        if not 0 < self.low <= self.initial <= self.high:
            problems.append(f"0 < low <= initial <= high does not hold for {self.low}, {self.initial}, {self.high}")
        if not (self.rate > 0 and self.max_error > 0 and self.rate * self.max_error < 1):
            problems.append(f"rate {self.rate} and max_error {self.max_error}: both above 0, their product below 1")
        if problems:
            raise ConfigError(listing("an adaptive factor cannot work so:", problems))
        self._level = self.initial

    def value(self, step: int) -> float:
        return self._level

    def observe(self, divergence: float) -> None:
        if not math.isfinite(divergence):
            raise ObjectiveError(f"an adaptive factor was shown a divergence of {divergence}: check the step's metrics")
        error = min(max(divergence / self.target - 1, -self.max_error), self.max_error)
        self._level = min(max(self._level * (1 + self.rate * error), self.low), self.high)

    def state(self) -> dict[str, float]:
        return {"level": self._level}

    def load(self, state: dict[str, float]) -> None:
        if set(state) != {"level"} or not self.low <= state["level"] <= self.high:
            raise ConfigError(
                f"an adaptive factor resumes from a level within [{self.low}, {self.high}], not from {state}: resume"
                " with the schedule and bounds that the checkpoint was saved with"
            )
        self._level = state["level"]


def _progress(step: int, steps: int) -> float:
    return min(max(step, 0) / steps, 1.0) if steps > 0 else 1.0

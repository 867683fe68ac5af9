"""The factors of an objective's terms over the steps of a stage.

One object per stage. Its state is what the adaptive beta has learnt, and belongs into a checkpoint; everything else
follows from the config and the step.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_dgrpo.algorithms.losses import Loss
from megatron_dgrpo.algorithms.schedules import AdaptiveKL, Constant, Cosine, Linear, Schedule
from megatron_dgrpo.algorithms.terms import StatisticTerm
from megatron_dgrpo.config import coefficients
from megatron_dgrpo.config import objective as config

TEACHER = "teacher_"
"""The name of a divergence to a teacher begins so."""


class Factors:
    def __init__(self, objective: config.AnyObjective, loss: Loss) -> None:
        self._schedules: dict[str, Schedule] = {}
        self.figure: str | None = None
        """The metric that the adaptive beta observes: what the divergence's estimator reports."""
        for term in loss.terms:
            if term.name.startswith(TEACHER):
                assert isinstance(objective, config.Taught | config.KDObjective)
                self._schedules[term.name] = schedule(objective.beta)
                self.figure = f"{term.name}/{term.of if isinstance(term, StatisticTerm) else 'k1'}"
            elif term.name == "entropy" and isinstance(objective, config.OnPolicyObjective):
                self._schedules[term.name] = schedule(objective.entropy)
            elif term.name == "nll" and isinstance(objective, config.KDObjective):
                self._schedules[term.name] = schedule(objective.nll)
            else:
                self._schedules[term.name] = Constant(1.0)

    def at(self, step: int) -> dict[str, float]:
        """Of a step of the stage, which counts from 0."""
        return {name: schedule.value(step) for name, schedule in self._schedules.items()}

    def observe(self, numbers: Mapping[str, float]) -> None:
        """The metrics of a step's update, the same on every rank; after it."""
        if self.figure is not None and self.figure in numbers:
            for name, of_term in self._schedules.items():
                if name.startswith(TEACHER):
                    of_term.observe(numbers[self.figure])

    def state(self) -> dict[str, dict[str, float]]:
        return {name: state for name, schedule in self._schedules.items() if (state := schedule.state())}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        for name, of_term in self._schedules.items():
            of_term.load(dict(state.get(name, {})))


def schedule(of: coefficients.Constant | coefficients.Linear | coefficients.Cosine | coefficients.Adaptive) -> Schedule:
    match of:
        case coefficients.Constant():
            return Constant(of.value)
        case coefficients.Linear():
            return Linear(of.start, of.end, of.steps)
        case coefficients.Cosine():
            return Cosine(of.start, of.end, of.steps)
        case coefficients.Adaptive():
            return AdaptiveKL(of.initial, of.target, of.rate, of.max_error, of.low, of.high)

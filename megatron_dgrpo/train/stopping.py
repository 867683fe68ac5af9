"""Figures that end a stage before its last step.

Rank 0 alone has the figures: it observes each record of the stage, and says at the end of a step whether the stage is
over (saving.py). How often in a row a condition was met is in the checkpoints, so that a run that goes on decides as if
it had never been away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dgrpo.config.endings import StopWhen


class Stopping:
    """Of one stage."""

    def __init__(self, conditions: Sequence[StopWhen]) -> None:
        self._conditions = conditions
        self._in_a_row = [0] * len(conditions)
        self._values: list[float | None] = [None] * len(conditions)

    def state(self) -> dict[str, Any]:
        conditions = [condition.model_dump(mode="json") for condition in self._conditions]
        return {"conditions": conditions, "in_a_row": list(self._in_a_row), "values": list(self._values)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Conditions that were changed meanwhile begin anew."""
        for i, condition in enumerate(self._conditions):
            if condition.model_dump(mode="json") in state["conditions"]:
                known = state["conditions"].index(condition.model_dump(mode="json"))
                self._in_a_row[i], self._values[i] = state["in_a_row"][known], state["values"][known]

    def observe(self, record: Mapping[str, float]) -> None:
        for i, condition in enumerate(self._conditions):
            if condition.metric in record and self._in_a_row[i] < condition.in_a_row:  # what was met stays so
                value = self._values[i] = float(record[condition.metric])
                self._in_a_row[i] = self._in_a_row[i] + 1 if _met(condition, value) else 0

    @property
    def over(self) -> bool:
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """The first condition that is met; nothing if none is."""
        for condition, count, value in zip(self._conditions, self._in_a_row, self._values, strict=True):
            if count >= condition.in_a_row:
                limit = f"above {condition.above:g}" if condition.above is not None else f"below {condition.below:g}"
                often = f", {count} times in a row" if condition.in_a_row > 1 else ""
                return f"{condition.metric} is {value:.6g}, {limit}{often}"
        return ""

    @property
    def unseen(self) -> str:
        """Names that no record had."""
        pairs = zip(self._conditions, self._values, strict=True)
        return ", ".join(condition.metric for condition, value in pairs if value is None)


def _met(condition: StopWhen, value: float) -> bool:
    """A NaN meets nothing."""
    if condition.above is not None:
        return value > condition.above
    return condition.below is not None and value < condition.below

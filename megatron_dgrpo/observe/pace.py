"""How long what is left of a stage will take, from the steps seen last.

Records have the time of the day, and a clock may be set back between two of them: no time has passed then, as far as
they tell, and what follows is counted on from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

_STEPS = 20
"""Steps that the pace is taken from: enough to even out evaluations, few enough to follow a change."""


class Pace:
    def __init__(self) -> None:
        self._stage: int | None = None
        self._seen: deque[tuple[int, float]] = deque(maxlen=_STEPS + 1)
        self._set_back = 0.0  # by how much, so far

    def observe(self, record: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl."""
        number, step, moment = record.get("stage_number"), record.get("step"), record.get("time")
        if not isinstance(step, int) or not isinstance(moment, int | float):
            return
        if number != self._stage or (self._seen and step < self._seen[-1][0]):
            self._stage = number
            self._seen.clear()
        if not self._seen or step > self._seen[-1][0]:
            if self._seen:
                self._set_back += max(0.0, self._seen[-1][1] - moment - self._set_back)
            self._seen.append((step, moment + self._set_back))

    def left_s(self, steps: int) -> float | None:
        """Seconds until step `steps` of the stage; None while nothing is known."""
        if len(self._seen) < 2:
            return None
        (first, began), (last, now) = self._seen[0], self._seen[-1]
        return max(0, steps - last) * (now - began) / (last - first)


def in_words(seconds: float) -> str:
    """12 s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

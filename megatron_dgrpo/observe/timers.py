"""Where a step's time goes, by phase: generate, score, pack, teach, train, sync.

A phase inside another stops the outer one's clock, so that phases add up to no more than the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """The clocks of one step, which starts when this is made."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._running: list[str] = []
        self._since = self._began
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the phase; a phase may come several times."""
        self._book()
        self._running.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def _book(self) -> None:
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase so far, the running one's too."""
        self._book()
        return dict(self._seconds)

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return self._clock() - self._began

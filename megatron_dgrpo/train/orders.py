"""Saving and ending on all ranks at one step: rank 0 decides, the others hear it in its announcements.

At the end of every step rank 0 says an `Order`. A run that is told to end while rank 0 waits for an engine gives the
batch up: no weight has moved since the last step, so that what was true then is what is saved. The supervisor's signal
raises `Ended` there, and only there: everywhere else a rank goes on to the end of its step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from megatron_dgrpo.launch.requests import NUDGE, Requests
from megatron_dgrpo.rollout.codec import register


@register
@dataclass(frozen=True)
class Order:
    save: bool = False
    end: bool = False
    over: bool = False  # the stage, by its stop_when


class Ended(Exception):
    """The run is told to end. With the order, or without one on rank 0, which then has to give it."""

    def __init__(self, order: Order | None = None) -> None:
        super().__init__("the run was told to end")
        self.order = order


class Waiting:
    """Rank 0's waits for engines, which a request to end cuts short. Made in the main thread."""

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self._open = False
        signal.signal(NUDGE, self._on_nudge)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._open = True
        try:
            if self.requests.end:  # it came before
                raise Ended
            yield
        finally:
            self._open = False

    def _on_nudge(self, number: int, frame: FrameType | None) -> None:
        if self._open and self.requests.end:
            self._open = False
            raise Ended

"""Groups on their way from an engine that generates to a trainer that takes them when it can.

A thread drains the source, in which the engine's answers are received and scored, and writes each group into the
journal at once. So neither the engine nor its deadline ever waits for the trainer, and nothing piles up in a socket.
Memory is bounded all the same: a group that finds `in_memory` others waiting is dropped, and read back from the journal
when its turn comes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout.journal import Journal, Place
from megatron_dgrpo.rollout.messages import Group


class Feed:
    """`count` groups that a thread takes from a source as they come, for another thread that takes them when it can."""

    def __init__(self, source: Iterator[Group], count: int, journal: Journal, *, in_memory: int) -> None:
        self._source, self._journal, self._in_memory = source, journal, in_memory
        self._changed = threading.Condition()
        self._waiting: deque[Group | Place] = deque()
        self._left = count  # to be taken
        self._ended = False
        self._error: BaseException | None = None
        self.held = self.most_held = 0
        """Of those that wait, in memory: now, and at most so far."""
        self._thread = threading.Thread(target=self._drain, name="feed", daemon=True)
        self._thread.start()

    def take(self, at_least: int, deadline_s: float) -> tuple[list[Group], bool]:
        """What waits, once there are so many or no more will come, and whether it is the last; raises what the source
        raised. After the last one the thread has ended and the source may be used by others."""
        at_least = min(at_least, self._left)
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended or len(self._waiting) >= at_least, deadline_s):
                raise RolloutError(
                    f"{len(self._waiting)} groups have ended within {deadline_s:g} s, of {at_least} to train on: look "
                    "for a reward or an engine that hangs"
                )
            found = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._in_memory))]
            self.held -= sum(isinstance(one, Group) for one in found)
        self._left -= len(found)
        if not self._left:
            self._thread.join(deadline_s)
        if self._error is not None:
            raise self._error
        return [one if isinstance(one, Group) else self._journal.read(one) for one in found], not self._left

    def _drain(self) -> None:
        try:
            for group in self._source:
                place = self._journal.append(group)
                with self._changed:
                    fits = self.held < self._in_memory
                    self._waiting.append(group if fits else place)
                    self.held += fits
                    self.most_held = max(self.most_held, self.held)
                    self._changed.notify()
        except BaseException as error:  # of whatever kind: it belongs to who waits
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

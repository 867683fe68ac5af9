"""Engine hosts that are started again when they end: which ones, when, and when not any more.

A host that served once and ends in whatever way is started again after a pause that doubles, until it has ended more
often within an hour than `max_restarts` says; then its end is the run's. A host that never served has a reason that
the next one would have, too: its first end is the run's. A host counts as serving once its socket is there.

A host that hangs does not end of itself. Rank 0 finds that out and says so (`discard`); from then on it is one that
ended.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dgrpo.launch.nursery import Child, in_words

_WINDOW_S = 3600.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_STACKS_S = 0.3


@dataclass
class Kept:
    """One engine host. `start` starts another process of the same name."""

    child: Child
    start: Callable[[], Child]
    socket: Path
    max_restarts: int
    served: bool = False
    ends: list[float] = field(default_factory=list)  # within the window
    due: float | None = None  # when it is started again; None while it runs, and when it is not
    words: str = ""  # of rank 0, where it had this process ended

    @property
    def given_up(self) -> bool:
        return self.child.returncode is not None and self.due is None


class Keeper:
    def __init__(self, say: Callable[[str], None]) -> None:
        self._kept: dict[str, Kept] = {}
        self._say = say

    def keep(self, kept: Kept) -> None:
        self._kept[kept.child.name] = kept

    def revives(self, child: Child) -> bool:
        """Whether a process that ended is going to be started again."""
        kept = self._kept.get(child.name)
        return kept is not None and kept.child is child and not kept.given_up

    def history(self, child: Child) -> str:
        """What to add to the news of an end that is the run's."""
        kept = self._kept.get(child.name)
        if kept is None or kept.child is not child:
            return ""
        words = f" Rank 0 had it ended: {kept.words}." if kept.words else ""
        if not kept.served:
            return f"{words} It had not served yet, so that another one would end like it."
        times = max(0, len(kept.ends) - 1)
        return f"{words} It had been started again {times} times within an hour (max_restarts={kept.max_restarts})."

    def discard(self, name: str, pid: int, why: str) -> None:
        """End a process that is of no use, unless it has ended."""
        kept = self._kept.get(name)
        if kept is None or kept.child.pid != pid or kept.child.returncode is not None:
            return
        kept.words = why
        self._say(f"{name} (pid {pid}) is ended: {why}")
        kept.child.kill(signal.SIGUSR1)  # it writes into its log where it hangs, if it can
        time.sleep(_STACKS_S)
        kept.child.kill()

    def tend(self, *, over: bool) -> list[Child]:
        """Note who serves and who ended, and start again whose turn it is; the old processes of those. When the run is
        `over`, hosts end because their owner has."""
        replaced: list[Child] = []
        for kept in self._kept.values():
            now = time.monotonic()
            if kept.child.returncode is None:
                kept.served = kept.served or kept.socket.exists()
            elif kept.due is None:
                self._plan(kept, now)
            elif now >= kept.due and not over:
                kept.socket.unlink(missing_ok=True)  # of the old process: nobody listens there
                old, kept.child, kept.due, kept.words = kept.child, kept.start(), None, ""
                replaced.append(old)
                how = in_words(old.returncode or 0)
                self._say(f"{old.name} (pid {old.pid}) {how}; it is started again (pid {kept.child.pid})")
        return replaced

    def _plan(self, kept: Kept, now: float) -> None:
        """Of a host that has ended just now: whether it is started again, and when."""
        ended = kept.child.died_at or now
        if ended in kept.ends:
            return  # it was given up
        kept.ends = [end for end in kept.ends if ended - end < _WINDOW_S] + [ended]
        kept.served = kept.served or kept.socket.exists()
        if kept.served and len(kept.ends) <= kept.max_restarts:
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (len(kept.ends) - 1))
            kept.due = ended + pause

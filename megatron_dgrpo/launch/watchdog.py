"""What hangs without ending: a server of processes that answers no question, and a rank 0 that shows no sign of life.

Of all other processes somebody in the run waits for an answer with a deadline: ranks for one another in collectives,
rank 0 for engines, rewards and data. Nobody waits for these two but the supervisor, which tells a hang of them from
work in this way:

- a server is asked every few seconds. It only waits and forks, so that one that has not answered for `ANSWER_S` hangs;
  nobody would hear of the end of its processes any more.
- rank 0's main thread moves (observe/pulse.py), or what it does gets on (its board).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_dgrpo.launch.nursery import Nursery
from megatron_dgrpo.observe.pulse import SUFFIX

ASK_S = 5.0
ANSWER_S = 120.0


class Watchdog:
    """`board` is rank 0's; `stall_s` is how long it may show nothing, from its first sign on (None: for ever)."""

    def __init__(self, servers: Callable[[], Iterable[Nursery]], board: Path, stall_s: float | None) -> None:
        self._servers, self._board, self._stall_s = servers, board, stall_s
        self._asked_at = self._looked_at = 0.0
        self._seen: list[bytes] = []
        self._moved_at = time.monotonic()

    @staticmethod
    def hangs(server: Nursery) -> bool:
        return server.silent_s > ANSWER_S

    def problem(self) -> str:
        """What hangs, in words; empty where nothing does. Called often."""
        now = time.monotonic()
        for server in self._servers():
            if now - self._asked_at >= ASK_S:
                server.ask()
            if self.hangs(server):
                return f"The processes' server (pid {server.server.pid}) has not answered for {ANSWER_S:g} s: it hangs"
        if now - self._asked_at >= ASK_S:
            self._asked_at = now
        if self._stall_s is None or now - self._looked_at < 1.0:
            return ""
        self._looked_at = now
        seen = [_content(path) for path in (self._board, Path(f"{self._board}{SUFFIX}"))]
        if seen != self._seen or not seen[1]:  # it has not begun
            self._seen, self._moved_at = seen, now
        if now - self._moved_at > self._stall_s:
            return f"rank0 has shown no sign of life for {self._stall_s:g} s (stall_timeout_s): it hangs"
        return ""


def _content(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""

"""A sign of life of a process whose main thread may hang: in a lock, a dead file system, a driver.

A thread looks every few seconds where the main thread is (the code and the instruction of each of its frames), and
counts in a file when that has changed. A process that is stopped counts nothing, and neither does one whose main thread
stays where it is; one that works does, without a word in its code. A wait for others looks like a hang, too: who
watches allows for the longest one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

from megatron_dgrpo.observe.progress import VARIABLE

INTERVAL_S = 2.0
SUFFIX = ".pulse"
"""The file lies beside the process's board."""


class Pulse:
    """Of the thread that makes it. Without a board there is nobody who watches."""

    def __init__(self, board: str | Path | None = None) -> None:
        board = board or os.environ.get(VARIABLE)
        self._path = Path(f"{board}{SUFFIX}") if board else None
        self._watched, self._stop = threading.get_ident(), threading.Event()
        if self._path is not None:
            threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        assert self._path is not None
        count, before = 0, None
        while True:
            now = _place(self._watched)
            if now != before:
                count, before = count + 1, now
                with contextlib.suppress(OSError):  # the folder goes with the supervisor
                    self._path.write_text(str(count))
            if self._stop.wait(INTERVAL_S):
                return


def _place(thread: int) -> list[tuple[int, int]]:
    """Where a thread is."""
    frame, found = sys._current_frames().get(thread), []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return found

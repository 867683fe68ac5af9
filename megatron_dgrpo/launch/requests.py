"""How the supervisor asks a run to save, or to save and end, and how it knows that there is something to save.

Files of the run's private folder are the state, and a signal to rank 0 (SIGUSR2) only says that it changed: a request
is not lost while a rank starts, and two of them are one. Rank 0 looks at the end of each step; where it waits for an
engine, the signal makes it look at once. Imports no torch.
"""

from __future__ import annotations

import signal
from pathlib import Path

NUDGE = signal.SIGUSR2
ENDED_EARLY = 75
"""Exit status of a run that ended before its time limit and is to be started again (EX_TEMPFAIL)."""


class Requests:
    def __init__(self, folder: str | Path) -> None:
        self._save, self._end, self._unsaved = (Path(folder) / f"request-{name}" for name in ("save", "end", "unsaved"))

    def ask(self, *, end: bool) -> None:
        """By the supervisor."""
        (self._end if end else self._save).touch()

    @property
    def end(self) -> bool:
        return self._end.exists()

    @property
    def save(self) -> bool:
        return self._save.exists()

    def saved(self) -> None:
        """By rank 0: the request to save was followed."""
        self._save.unlink(missing_ok=True)

    @property
    def unsaved(self) -> bool:
        """Whether rank 0 holds updates that no checkpoint has."""
        return self._unsaved.exists()

    @unsaved.setter
    def unsaved(self, value: bool) -> None:
        if value:
            self._unsaved.touch()
        else:
            self._unsaved.unlink(missing_ok=True)

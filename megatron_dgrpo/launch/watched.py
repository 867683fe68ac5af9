"""A process as the supervisor watches it: of which kind it is, and what its end means."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from megatron_dgrpo.launch.nursery import Child, in_words

Kind = Literal["trainer", "engine"]


@dataclass(frozen=True)
class Watched:
    child: Child
    kind: Kind

    @property
    def may_end(self) -> bool:
        """Whether ending with status 0, before it is told to, is no failure."""
        return self.kind == "trainer"

    @property
    def failed(self) -> bool:
        status = self.child.returncode
        return status is not None and not (self.may_end and status == 0)

    def describe(self) -> str:
        role = "trainer rank" if self.kind == "trainer" else "engine host"
        return f"{self.child.name} ({role}, pid {self.child.pid}) {in_words(self.child.returncode or 0)}"


def how_early(process: Watched) -> tuple[bool, float]:
    """Deaths by a signal first (but SIGABRT: so libraries end their process when another one is gone), then by time."""
    status = process.child.returncode or 0
    return status >= 0 or status == -signal.SIGABRT, process.child.died_at or 0.0


def hint(child: Child) -> str:
    if child.returncode == -signal.SIGKILL:
        return " Nobody in the run sends SIGKILL before it ends: see `dmesg` for the kernel's out-of-memory killer."
    if child.returncode == 0:
        return " It ended of itself, before it was told to."
    return ""

"""What a rank goes on from that has a part of a teacher and none of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dgrpo.testing import run_forked


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state(self) -> Any:
        return self.count

    def restore(self, state: Any) -> None:
        self.count = state


def _entered(stage: int) -> Any:
    from types import SimpleNamespace

    from megatron_dgrpo.train.resuming import Resumed
    from megatron_dgrpo.train.saving import Progress

    trainer = {"stage": 1, "step": 7, "evaluated": True, "over": False, "parts": {"data": 40, "factors": {}}}
    progress, rows = object.__new__(Progress), Counter()
    progress._run, progress._resumed = SimpleNamespace(student=None), Resumed(Path("01-000007"), trainer)  # type: ignore[assignment]
    progress._parts = {"data": rows}
    return progress._enter(stage), rows.count


def test_a_rank_of_the_teacher_alone_goes_on_at_the_same_rows() -> None:
    assert run_forked(_entered, 1) == ((7, True, False), 40)
    assert run_forked(_entered, 2) == ((0, False, False), 0)  # a later stage begins

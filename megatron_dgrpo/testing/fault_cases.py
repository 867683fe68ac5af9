"""Where to kill: every named point that a run reaches, in every role, and what has to come before for the rare ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_dgrpo.points.plan import AFTER, BEFORE, HALF, Fault
from megatron_dgrpo.points.table import POINTS, Kind

_MOMENTS: dict[Kind, tuple[str, ...]] = {
    "open": (AFTER,),
    "write": (HALF, AFTER),
    "file": (HALF, AFTER),
    "sync": (BEFORE,),
    "cut": (BEFORE, AFTER),
    "rename": (BEFORE, AFTER),
    "remove": (BEFORE, AFTER),
    "tree": (BEFORE, HALF),
    "send": (HALF,),
    "place": (BEFORE,),
}


@dataclass(frozen=True)
class Case:
    """A kill. The start before it has faults of its own, where the point is reached only then."""

    fault: Fault
    beside: tuple[Fault, ...] = ()
    """In the same start."""
    before: tuple[Fault, ...] = ()
    damaged: bool = False
    """The newest checkpoint is damaged first."""
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.fault.role} {self.fault.point} {self.fault.moment}"


def _kill(point: str, moment: str = BEFORE, nth: int = 1, role: str = "rank0") -> Fault:
    return Fault(point, "kill", moment, nth, role)


_STEP_LOST = (_kill("step.end", nth=2),)
_WIRE = ("engines.rollout.transport=wire",)
RARE: dict[str, Case] = {
    case.fault.point: case
    for case in (
        Case(_kill("resume"), before=(_kill("save.done"),)),
        Case(_kill("load"), before=(_kill("save.done"),)),
        Case(_kill("journal.torn"), before=(_kill("journal.record", HALF, 2),)),
        Case(_kill("removed.open"), before=_STEP_LOST),
        Case(_kill("removed.lines"), before=_STEP_LOST),
        Case(_kill("removed.sync"), before=_STEP_LOST),
        Case(_kill("records.cut"), before=_STEP_LOST),
        Case(_kill("records.new"), before=(_kill("save.snapshot", nth=2),)),
        Case(_kill("records.name"), before=(_kill("save.snapshot", nth=2),)),
        Case(_kill("folder.left_over"), before=(_kill("checkpoint.manifest"),)),
        Case(_kill("prune.left_over"), before=(_kill("prune.tree", HALF),)),
        Case(_kill("damaged.name"), before=(_kill("save.done", nth=2),), damaged=True),
        Case(_kill("folder.failed"), beside=(Fault("checkpoint.trainer", "no_space", HALF, role="rank0"),)),
        Case(_kill("journal.undo"), beside=(Fault("journal.record", "no_space", HALF, 2, "rank0"),)),
        Case(_kill("metrics.undo"), beside=(Fault("metrics.line", "no_space", HALF, 2, "rank0"),)),
        Case(_kill("inbox.file", role="engine-rollout"), overrides=_WIRE),
        Case(_kill("inbox.bytes", role="engine-rollout"), overrides=_WIRE),
    )
}

ELSEWHERE = {
    "device.sum": "buckets on devices: tests/rollout/test_rollout_device_push.py",
    "export.index": "a model of several files: tests/checkpoint/test_interrupted.py",
    "metrics.torn": "a run cuts torn lines with those after its checkpoint: tests/observe/test_observe_metrics.py",
    "report.new": "`dgrpo report`: tests/observe/test_report_kill.py",
    "report.name": "`dgrpo report`: tests/observe/test_report_kill.py",
}
"""Points that no run of the soak reaches, with what tests kills there."""


def cases(reached: Mapping[str, Counter[str]], seed: int) -> list[Case]:
    """A case for each moment of each point of each role that an unbroken run has `reached` (how often), and for the
    rare ones. Which of the times a process is killed at is drawn, out of the first half of them."""
    draw, found = random.Random(seed), list[Case]()
    for role, counts in sorted(reached.items()):
        for point, count in sorted(counts.items()):
            if point not in RARE:
                for moment in _MOMENTS[POINTS[point].kind]:
                    found.append(Case(Fault(point, "kill", moment, draw.randint(1, max(1, count // 2)), role)))
    for case in RARE.values():
        kind = POINTS[case.fault.point].kind
        found += [replace(case, fault=replace(case.fault, moment=moment)) for moment in _MOMENTS[kind]]
    return found

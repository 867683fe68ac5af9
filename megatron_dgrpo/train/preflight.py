"""Before the first update of a stage: does its teacher's signal arrive in *this* trainer, and is it the right one?

The first micro-batch goes through the student once more, without gradients; a few of its loss rows, with the teacher's
rows that the update is about to use, are put to the checks of `algorithms/preflight.py`. Beside them, the teacher
scores the batch a second time: rows that were exchanged or belong to other tokens do not come out the same. The
cost is a teacher's forward over one update's batch, once a stage. All ranks learn of a problem together.

Legend: _R loss rows, _RH rows x hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_dgrpo.algorithms.factors import TEACHER
from megatron_dgrpo.algorithms.preflight import Preflight, Rows, Score, preflight, preflight_path
from megatron_dgrpo.errors import ObjectiveError, listing
from megatron_dgrpo.heads import HeadShard
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.teacher.rows import TeacherRows
from megatron_dgrpo.train.rows import LossRows
from megatron_dgrpo.train.student import Student
from megatron_dgrpo.train.update import Work, each_micro_batch, loss_rows

NUM_ROWS = 256
"""Rows that are looked at on each rank; a problem of the kind that is looked for shows in any of them."""

SECOND_SCORE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest share of their norm by which a teacher's rows may differ between two forwards of the same tokens."""


def check_update(
    student: Student, work: Work, again: TeacherRows | None, factors: Mapping[str, float], *, same_weights: bool
) -> dict[str, float]:
    """Raise on every rank what is wrong on any; else what was measured, the worst of all ranks.

    `again` are the teacher's rows from a second scoring of the same batch (None where there is no head), `factors` what
    the config says of this update. `same_weights`: the teacher's are the student's.
    """
    rows = _first_rows(student, work)
    problems, measured = [], dict[str, float]()
    for name in factors:
        if name.startswith(TEACHER) and factors[name] > 0 and not work.factors.get(name, 1.0) > 0:
            problems.append(
                f"the coefficient of {name} is {work.factors.get(name)} in the update, and {factors[name]:g} by the"
                " configuration"
            )
    if rows is not None and len(rows.targets_R):
        for report in _reports(rows, work, same_weights):
            problems += report.problems
            measured |= report.measured
    gap = _second_score(work, again)
    tolerance = SECOND_SCORE_TOLERANCE[work.teacher_rows.hidden_MH.dtype] if work.teacher_rows is not None else 0.0
    measured["second_score"] = gap
    if not gap <= tolerance:
        problems.append(
            f"the teacher's rows differ by {gap:.3g} of their norm from a second scoring of the same tokens, not <="
            f" {tolerance:g}: they are in another order, belong to other tokens, or were changed on their way"
        )
    return _agree(problems, measured, student)


def _first_rows(student: Student, work: Work) -> LossRows | None:
    """Rows of this rank's first micro-batch; None where this rank has no head."""
    kept: list[LossRows] = []

    def keep(hidden: torch.Tensor, layout: Layout) -> None:
        kept.append(loss_rows(student, hidden, layout, work).first(NUM_ROWS))

    each_micro_batch(student, work.layouts[:1], keep)
    return kept[0] if kept else None


def _reports(rows: LossRows, work: Work, same_weights: bool) -> list[Preflight]:
    """A schedule may begin at 0: its teacher is looked at with a coefficient of 1."""
    assert rows.teacher_RH is not None and rows.teacher_head is not None
    want = {"kl", *work.loss.statistics}
    own_head = HeadShard(rows.head.weight_VH.detach(), rows.head.start, rows.head.num_valid)

    def score(teacher_head: HeadShard) -> Score:
        head = replace(rows.head, weight_VH=rows.head.weight_VH.detach())
        return lambda student_TH, teacher_TH: replace(
            rows, hidden_RH=student_TH, head=head, teacher_RH=teacher_TH, teacher_head=teacher_head
        ).score(want)

    factors = {n: 1.0 if n.startswith(TEACHER) and f == 0 else f for n, f in work.factors.items()}
    some = Rows(rows.streams, rows.hidden_RH, rows.teacher_RH)
    own, pair = score(own_head), score(rows.teacher_head)
    found = [preflight(work.loss, factors, some, own=own, pair=pair, temperature=rows.temperature)]
    if same_weights:
        found.append(preflight_path(some, pair=pair, temperature=rows.temperature))
    return found


def _second_score(work: Work, again: TeacherRows | None) -> float:
    """How much the first micro-batch's teacher rows differ from newly computed ones, relative to their norm."""
    stream_R = torch.from_numpy(work.layouts[0].row_stream_R).to(platform.device())
    if work.teacher_rows is None or again is None or not len(stream_R):
        return 0.0
    handed_RH, again_RH = (rows.select(stream_R).double() for rows in (work.teacher_rows, again))
    return float((handed_RH - again_RH).norm() / handed_RH.norm().clamp_min(1e-30))


def _agree(problems: list[str], measured: Mapping[str, float], student: Student) -> dict[str, float]:
    """The worst figures of all ranks, after all of them have raised together if one has a problem."""
    names = ("identical_kl", "identical_adds", "path_kl", "path_kl_max", "second_score")
    figures = [measured.get(name, -torch.inf) for name in names]
    least = -measured.get("perturbed_changes", torch.inf)
    worst = torch.tensor([float(len(problems)), least, *figures], dtype=torch.float64, device=platform.device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=student.decoder.groups.world)
    count, least, *figures = worst.tolist()
    if count:
        raise ObjectiveError(
            listing(
                "The objective is not what the configuration says; no weight was changed. On this rank:",
                problems or ["nothing: see the other ranks' logs"],
            )
        )
    found = {"perturbed_changes": -least, **dict(zip(names, figures, strict=True))}
    return {f"preflight/{name}": value for name, value in found.items() if abs(value) != torch.inf}

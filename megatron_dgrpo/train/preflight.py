"""Before the first update of a stage: does its teacher's signal arrive in *this* trainer, and is it the right one?

The first micro-batch goes through the student once more, without gradients; a few of its loss rows, with the teacher's
rows that the update is about to use, are put to the checks of `algorithms/preflight.py`. Beside them, the teacher
scores the batch a second time: rows that were exchanged or belong to other tokens do not come out the same. The
cost is a teacher's forward over one update's batch, once a stage. All ranks learn of a problem together.

Of several teachers each is looked at with rows of its own, from any of the micro-batches. One that has no row in the
first update's batch is not looked at.

Legend: _R loss rows, _RH rows x hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
from megatron_dgrpo.train.teachers import Lesson
from megatron_dgrpo.train.update import Work, each_micro_batch, loss_rows

NUM_ROWS = 256
"""Rows that are looked at on each rank; a problem of the kind that is looked for shows in any of them."""

SECOND_SCORE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest share of their norm by which a teacher's rows may differ between two forwards of the same tokens."""


def check_update(
    student: Student,
    work: Work,
    again: Sequence[Lesson],
    factors: Mapping[str, float],
    *,
    same_weights: Collection[str] = (),
) -> dict[str, float]:
    """Raise on every rank what is wrong on any; else what was measured, the worst of all ranks.

    `again` is what the teachers say when they score the same batch a second time, `factors` what the config says of
    this update. `same_weights`: the teachers with the student's.
    """
    layouts = work.layouts if len(work.lessons) > 1 else work.layouts[:1]
    kept = _some_rows(student, replace(work, layouts=layouts))
    problems: list[str] = []
    measured: list[Mapping[str, float]] = []
    for name in factors:
        if name.startswith(TEACHER) and factors[name] > 0 and not work.factors.get(name, 1.0) > 0:
            problems.append(
                f"the coefficient of {name} is {work.factors.get(name)} in the update, and {factors[name]:g} by the"
                " configuration"
            )
    for number, (first, second) in enumerate(zip(work.lessons, again, strict=True)):
        of = f"teacher {first.name}: " if len(work.lessons) > 1 else ""
        if number in kept:
            for report in _reports(kept[number], work, first.name in same_weights):
                problems += [of + problem for problem in report.problems]
                measured.append(report.measured)
        gap = _second_score(work, layouts, number, first.rows, second.rows)
        measured.append({"second_score": gap})
        tolerance = SECOND_SCORE_TOLERANCE[first.rows.hidden_MH.dtype] if first.rows is not None else 0.0
        if not gap <= tolerance:
            problems.append(
                f"{of}the teacher's rows differ by {gap:.3g} of their norm from a second scoring of the same tokens,"
                f" not <= {tolerance:g}: they are in another order, belong to other tokens or were changed on their way"
            )
    return _agree(problems, measured, student)


def _some_rows(student: Student, work: Work) -> dict[int, LossRows]:
    """Rows of the first micro-batch that has any, by the number of their teacher; none where this rank has no head."""
    kept: dict[int, LossRows] = {}

    def keep(hidden: torch.Tensor, layout: Layout) -> None:
        rows = loss_rows(student, hidden, layout, work)
        for number, taught in enumerate(rows.taught):
            if number not in kept and len(taught.index_S):
                kept[number] = rows.part(taught).first(NUM_ROWS)

    each_micro_batch(student, work.layouts, keep)
    return kept


def _reports(rows: LossRows, work: Work, same_weights: bool) -> list[Preflight]:
    """A schedule may begin at 0: its teacher is looked at with a coefficient of 1."""
    (taught,) = rows.taught
    want = {"kl", *work.loss.statistics}
    own_head = HeadShard(rows.head.weight_VH.detach(), rows.head.start, rows.head.num_valid)

    def score(teacher_head: HeadShard) -> Score:
        head = replace(rows.head, weight_VH=rows.head.weight_VH.detach())
        return lambda student_TH, teacher_TH: replace(
            rows, hidden_RH=student_TH, head=head, taught=(replace(taught, hidden_SH=teacher_TH, head=teacher_head),)
        ).score(want)

    factors = {n: 1.0 if n.startswith(TEACHER) and f == 0 else f for n, f in work.factors.items()}
    some = Rows(rows.streams, rows.hidden_RH, taught.hidden_SH)
    own, pair = score(own_head), score(taught.head)
    found = [preflight(work.loss, factors, some, own=own, pair=pair, temperature=rows.temperature)]
    if same_weights:
        found.append(preflight_path(some, pair=pair, temperature=rows.temperature))
    return found


def _second_score(
    work: Work, layouts: Sequence[Layout], number: int, handed: TeacherRows | None, again: TeacherRows | None
) -> float:
    """How much a teacher's rows in these micro-batches differ from newly computed ones, relative to their norm."""
    stream_R = torch.cat([torch.from_numpy(layout.row_stream_R) for layout in layouts])
    if work.streams.teacher_N is not None:
        stream_R = stream_R[work.streams.teacher_N[stream_R] == number]
    if handed is None or again is None or not len(stream_R):
        return 0.0
    stream_R = stream_R.to(platform.device())
    handed_RH, again_RH = (rows.select(stream_R).double() for rows in (handed, again))
    return float((handed_RH - again_RH).norm() / handed_RH.norm().clamp_min(1e-30))


def _agree(problems: list[str], measured: Sequence[Mapping[str, float]], student: Student) -> dict[str, float]:
    """The worst figures of all teachers and ranks, after all of them have raised together if one has a problem."""
    names = ("identical_kl", "identical_adds", "path_kl", "path_kl_max", "second_score")
    figures = [_worst(some.get(name, -torch.inf) for some in measured) for name in names]
    least = _worst(-some.get("perturbed_changes", torch.inf) for some in measured)
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


def _worst(figures: Iterable[float]) -> float:
    """The largest, where a NaN is the worst of all."""
    return float(torch.tensor([-torch.inf, *figures], dtype=torch.float64).max())

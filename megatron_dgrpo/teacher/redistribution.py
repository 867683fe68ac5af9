"""Teacher rows from where its last stage made them to where the student's last stage needs them.

The student's ranks share out a batch of trees, the teacher's those of them that it scores, each over its own data- and
context-parallel ranks. So every rank can say, without asking, which rows any rank has and wants, and one all-to-all
with known sizes moves them. It runs between the
teacher's forward and the student's schedule, never inside either.

All tensor-parallel ranks of a stage have the same rows; the student's rank u takes from the teacher's rank u mod tp.

Legend: M rows that this rank holds, H the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trees import Tree
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Grid
from megatron_dgrpo.teacher.rows import TeacherRows


def redistribute(
    rows: TeacherRows | None,
    scored: Sequence[Tree],
    trees: Sequence[Tree],
    *,
    teacher: Grid,
    student: Grid,
    teacher_packing: Packing,
    student_packing: Packing,
    hidden_size: int,
    dtype: torch.dtype,
    spread: bool,
    group: dist.ProcessGroup,
) -> TeacherRows | None:
    """The rows of what is `scored` in this rank's share of the student's `trees`, on its last stage; elsewhere None.

    Every rank of `group`, which has all ranks of both models under their numbers in the world, calls it, with `rows` on
    the teacher's last stage. With `spread`, a tensor-parallel rank of the student gets its part of the rows alone.
    """
    plan = _Plan(teacher, student, teacher_packing.rows(scored), student_packing.rows(trees), spread)
    me, ranks, where = dist.get_rank(), range(dist.get_world_size(group)), platform.device()
    if not scored:
        empty = torch.zeros(0, dtype=torch.int64, device=where), torch.zeros(0, hidden_size, dtype=dtype, device=where)
        return TeacherRows(*empty) if plan.is_target(me) else None
    outgoing = [plan.streams(me, receiver) for receiver in ranks]
    incoming = [plan.streams(sender, me) for sender in ranks]
    assert (rows is not None) == plan.is_source(me)
    sent_M = torch.from_numpy(np.concatenate(outgoing))
    sent_MH = torch.zeros(0, hidden_size, dtype=dtype, device=where) if rows is None else rows.select(sent_M.to(where))
    stream_M = torch.from_numpy(np.concatenate(incoming)).to(where)
    hidden_MH = torch.empty(len(stream_M), hidden_size, dtype=dtype, device=where)
    sizes_in, sizes_out = [len(s) for s in incoming], [len(s) for s in outgoing]
    dist.all_to_all_single(hidden_MH, sent_MH.contiguous(), sizes_in, sizes_out, group=group)
    return TeacherRows.collect([(stream_M, hidden_MH)]) if plan.is_target(me) else None


Rows = Mapping[tuple[int, int], np.ndarray]


class _Plan:
    """`made` and `needed` are stream indices by (data-parallel, context-parallel) rank."""

    def __init__(self, teacher: Grid, student: Grid, made: Rows, needed: Rows, spread: bool) -> None:
        self.teacher, self.student, self.spread = teacher, student, spread
        self.made, self.needed = made, {place: np.sort(streams) for place, streams in needed.items()}

    def is_source(self, rank: int) -> bool:
        return self.teacher.at(rank).member and self.teacher.at(rank).last_stage

    def is_target(self, rank: int) -> bool:
        return self.student.at(rank).member and self.student.at(rank).last_stage

    def streams(self, sender: int, receiver: int) -> np.ndarray:
        """Stream indices of the rows that go from one rank to another, ascending."""
        nothing = np.zeros(0, np.int64)
        if not (self.is_source(sender) and self.is_target(receiver)):
            return nothing
        source, target = self.teacher.at(sender), self.student.at(receiver)
        if source.coordinate("tp") != target.coordinate("tp") % source.tp:
            return nothing
        needed = self.needed[target.coordinate("dp"), target.coordinate("cp")]
        if self.spread:
            needed = needed[target.coordinate("tp") :: target.tp]
        made = self.made[source.coordinate("dp"), source.coordinate("cp")]
        return np.intersect1d(made, needed, assume_unique=True)

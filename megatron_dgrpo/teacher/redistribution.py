"""Teacher rows from where its last stage made them to where the student's last stage needs them.

Both models share out the same sequences, each over its own data-parallel ranks. So every rank can say, without asking,
which rows any rank has and wants, and one all-to-all with known sizes moves them. It runs between the teacher's forward
and the student's schedule, never inside either.

All tensor-parallel ranks of a stage have the same rows; the student's rank u takes from the teacher's rank u mod tp.

Legend: M rows that this rank holds, H the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_dgrpo.packing.pack import PackedSequence, share
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Grid
from megatron_dgrpo.teacher.rows import TeacherRows


def redistribute(
    rows: TeacherRows | None,
    sequences: Sequence[PackedSequence],
    *,
    teacher: Grid,
    student: Grid,
    hidden_size: int,
    dtype: torch.dtype,
    spread: bool,
    group: dist.ProcessGroup,
) -> TeacherRows | None:
    """The rows of this rank's share of the student's sequences, on the student's last stage; elsewhere None.

    Every rank of `group`, which has all ranks of both models under their numbers in the world, calls it, with `rows` on
    the teacher's last stage. With `spread`, a tensor-parallel rank of the student gets its part of the rows alone.
    """
    plan = _Plan(sequences, teacher, student, spread)
    me, ranks, where = dist.get_rank(), range(dist.get_world_size(group)), platform.device()
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


class _Plan:
    def __init__(self, sequences: Sequence[PackedSequence], teacher: Grid, student: Grid, spread: bool) -> None:
        self.teacher, self.student, self.spread = teacher, student, spread
        self.made = [_streams(share(sequences, rank, teacher.dp)) for rank in range(teacher.dp)]
        self.needed = [_streams(share(sequences, rank, student.dp)) for rank in range(student.dp)]

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
        needed = self.needed[target.coordinate("dp")]
        if self.spread:
            needed = needed[target.coordinate("tp") :: target.tp]
        return np.intersect1d(self.made[source.coordinate("dp")], needed, assume_unique=True)


def _streams(sequences: Sequence[PackedSequence]) -> np.ndarray:
    parts = [s.first_stream + np.arange(len(s.targets_K)) for s in sequences]
    return np.concatenate([np.zeros(0, np.int64), *parts])

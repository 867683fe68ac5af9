"""Which teacher scores what: several frozen models, each with trajectories of its own.

All ranks call everything here in the same order. Every teacher first computes its rows, and then all rows are handed
over: teachers that have ranks of their own compute at the same time. A teacher without a trajectory in a batch does
neither, on any rank.

Legend: _B trajectories of the batch, _N its loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dgrpo.heads import HeadShard
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trajectory import Trajectory, teacher_numbers
from megatron_dgrpo.packing.trees import Tree, trees
from megatron_dgrpo.teacher.frozen import FrozenTeacher
from megatron_dgrpo.teacher.rows import TeacherRows


@dataclass(frozen=True)
class Lesson:
    """What one teacher has to say of an update's batch; head and rows are on the student's last stage alone."""

    name: str
    head: HeadShard | None
    rows: TeacherRows | None


@dataclass(frozen=True)
class Teachers:
    """Their order is that of `Streams.teacher_N`."""

    names: tuple[str, ...]
    models: tuple[FrozenTeacher, ...]

    def teach(self, trajectories: Sequence[Trajectory], packing: Packing) -> tuple[Lesson, ...]:
        """A lesson of each teacher, for the batch that the student's ranks share out by `packing`."""
        grown = trees(trajectories)
        shares = _shares(grown, trajectories, self.names)
        pairs = list(zip(self.models, shares, strict=True))
        made = [model.score(mine, packing) for model, mine in pairs]
        return tuple(
            Lesson(name, model.head, model.hand_over(rows, mine, grown, packing))
            for name, rows, (model, mine) in zip(self.names, made, pairs, strict=True)
        )


def _shares(grown: Sequence[Tree], trajectories: Sequence[Trajectory], names: Sequence[str]) -> list[list[Tree]]:
    """The trees that each teacher scores: a prompt's responses have one teacher, the one that its row names."""
    number_B = teacher_numbers(trajectories, names)
    number_N = np.repeat(number_B, [t.num_loss_tokens for t in trajectories])
    shares: list[list[Tree]] = [[] for _ in names]
    for tree in grown:
        numbers = {int(number_N[branch.first_stream]) for branch in tree.branches}
        assert len(numbers) == 1, f"{tree.name} has several teachers"
        shares[numbers.pop()].append(tree)
    return shares

"""Process groups of one model, as explicit objects. Megatron's global `parallel_state` is never initialised.

A model's layout is a grid of axes tp (fastest), cp, dp, pp (slowest). The experts of a model have a grid of their own
on the same ranks: etp (fastest), ep, edp, pp, where etp x ep x edp = tp x cp x dp. Megatron asks for some twenty
groups; on these grids many of them have the same ranks, and one communicator serves all that do.

Every rank of the world makes the groups of every model, also of one that it has no part in: creating a communicator
is an act of all. A rank without a part has no groups (`member` is False).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_dgrpo.errors import LayoutError, listing
from megatron_dgrpo.parallel import platform

AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class Grid:
    """Lengths of the axes, and where this rank stands on each."""

    tp: int
    cp: int
    dp: int
    pp: int
    first_rank: int
    rank: int  # in the world
    ep: int = 1
    etp: int = 1

    @property
    def edp(self) -> int:
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    @property
    def size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.size)

    @property
    def member(self) -> bool:
        return self.rank in self.ranks

    @property
    def first_stage(self) -> bool:
        return self.coordinate("pp") == 0

    @property
    def last_stage(self) -> bool:
        return self.coordinate("pp") == self.pp - 1

    def at(self, rank: int) -> Grid:
        """The same grid as another rank sees it."""
        return replace(self, rank=rank)

    def length(self, axis: str) -> int:
        length: int = getattr(self, axis)
        return length

    def coordinate(self, axis: str) -> int:
        assert self.member, f"rank {self.rank} has no part in the model on ranks {self.ranks}"
        offset = self.rank - self.first_rank
        for name in EXPERT_AXES if axis in EXPERT_AXES[:3] else AXES:
            length = self.length(name)
            if name == axis:
                return offset % length
            offset //= length
        raise AssertionError(axis)

    def enumerate(self, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that differ only in `axes` (all of one of the two grids), in the grid's order."""
        expert = any(axis in EXPERT_AXES[:3] for axis in axes)
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in self.ranks:
            there = self.at(rank)
            key = tuple(there.coordinate(axis) for axis in (EXPERT_AXES if expert else AXES) if axis not in axes)
            groups.setdefault(key, []).append(rank)
        return tuple(tuple(ranks) for ranks in groups.values())


class Groups:
    """The communicators of one model on this rank."""

    def __init__(
        self,
        *,
        tp: int,
        dp: int,
        cp: int = 1,
        pp: int = 1,
        ep: int = 1,
        etp: int = 1,
        first_rank: int = 0,
        timeout_s: float = 600.0,
        backend: str | None = None,
    ):
        world = dist.get_world_size()
        self.grid = Grid(tp, cp, dp, pp, first_rank, dist.get_rank(), ep, etp)
        problems = []
        if first_rank + self.grid.size > world:
            problems.append(
                f"the layout tp={tp} cp={cp} dp={dp} pp={pp} needs ranks {first_rank} to "
                f"{first_rank + self.grid.size - 1}, but the world has {world}: make it smaller or start more ranks"
            )
        if tp * cp * dp % (etp * ep):
            problems.append(
                f"etp={etp} x ep={ep} does not divide tp={tp} x cp={cp} x dp={dp}, the ranks of a pipeline stage: "
                "choose a divisor"
            )
        if problems:
            raise LayoutError(listing("The process groups can't be made:", problems))
        self._timeout, self._backend = timedelta(seconds=timeout_s), backend or platform.backend()
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
        one, tp_, cp_, dp_, pp_ = (self._group(axes) for axes in ((), ("tp",), ("cp",), ("dp",), ("pp",)))
        dp_cp, model, everyone = self._group(("cp", "dp")), self._group(("tp", "pp")), self._group(AXES)
        ends = self._ends_of_pipelines()
        edp = self._group(("edp",))
        self.collection = ProcessGroupCollection(
            tp=tp_,
            cp=cp_,
            dp=dp_,
            pp=pp_,
            mp=model,
            dp_cp=dp_cp,
            intra_dp_cp=dp_cp,
            tp_cp=self._group(("tp", "cp")),
            tp_dp_cp=self._group(("tp", "cp", "dp")),
            embd=ends,
            pos_embd=one if self.member and self.grid.first_stage else None,
            ep=self._group(("ep",)),
            expt_tp=self._group(("etp",)),
            expt_dp=edp,
            intra_expt_dp=edp,
            expt_dp_gtp_remat=edp,  # who saves what Transformer Engine's experts keep beside their weights
            tp_ep=self._group(("etp", "ep")),
            tp_ep_pp=self._group(("etp", "ep", "pp")),
            intra_dist_opt=everyone,
            inter_dist_opt=None,
        )

    @property
    def member(self) -> bool:
        """Whether this rank has a part in the model."""
        return self.grid.member

    def _group(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        return self._make(self.grid.enumerate(axes))

    def _make(self, enumeration: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
        if enumeration not in self._made:
            group, _ = dist.new_subgroups_by_enumeration(
                [list(ranks) for ranks in enumeration], backend=self._backend, timeout=self._timeout
            )
            self._made[enumeration] = group
        return self._made[enumeration]

    def _ends_of_pipelines(self) -> dist.ProcessGroup | None:
        """First and last stage share a tied embedding; ranks between them are in no such group."""
        pipelines = self.grid.enumerate(("pp",))
        ends = self._make(tuple(tuple(dict.fromkeys((ranks[0], ranks[-1]))) for ranks in pipelines))
        return ends if self.member and (self.grid.first_stage or self.grid.last_stage) else None

    def seed(self, seed: int) -> None:
        """Seed Megatron's one random-state tracker, and make the one scratch buffer that it keeps for the process."""
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        place = self.grid.coordinate
        model_parallel_cuda_manual_seed(seed, tp_rank=place("tp"), ep_rank=place("ep"), etp_rank=place("etp"))

    @contextmanager
    def as_default(self) -> Iterator[None]:
        """This model's ranks in the place of the world, for calls into Megatron that gather over the default group.

        Ranks of another model have nothing to say there, and would be waited for.
        """
        c10d = dist.distributed_c10d
        outer = c10d._get_default_group()
        c10d._update_default_pg(self.world)
        try:
            yield
        finally:
            c10d._update_default_pg(outer)

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        return self.collection.dp_cp

    @property
    def world(self) -> dist.ProcessGroup:
        """Every rank of this model."""
        return self.collection.intra_dist_opt

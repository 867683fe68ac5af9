"""Process groups of one model, as explicit objects. Megatron's global `parallel_state` is never initialised.

A model's layout is a grid of axes tp (fastest), cp, dp, pp (slowest). Megatron asks for some twenty groups; on this
grid many of them have the same ranks, and one communicator serves all that do.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_dgrpo.errors import LayoutError
from megatron_dgrpo.parallel import platform

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes, and where this rank stands on each."""

    tp: int
    cp: int
    dp: int
    pp: int
    first_rank: int
    rank: int  # in the world

    @property
    def size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def coordinate(self, axis: str) -> int:
        offset = self.rank - self.first_rank
        for name in AXES:
            size = getattr(self, name)
            if name == axis:
                return offset % size
            offset //= size
        raise AssertionError(axis)

    def enumerate(self, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that differ only in `axes`, each in the order of the grid."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.first_rank, self.first_rank + self.size):
            other = Grid(self.tp, self.cp, self.dp, self.pp, self.first_rank, rank)
            key = tuple(other.coordinate(axis) for axis in AXES if axis not in axes)
            groups.setdefault(key, []).append(rank)
        return tuple(tuple(ranks) for ranks in groups.values())


class Groups:
    """The communicators of one model on this rank."""

    def __init__(self, *, tp: int, dp: int, cp: int = 1, pp: int = 1, first_rank: int = 0, timeout_s: float = 600.0):
        world = dist.get_world_size()
        self.grid = Grid(tp, cp, dp, pp, first_rank, dist.get_rank())
        if first_rank + self.grid.size > world:
            raise LayoutError(
                f"the layout tp={tp} cp={cp} dp={dp} pp={pp} needs ranks {first_rank} to "
                f"{first_rank + self.grid.size - 1}, but the world has {world}: make it smaller or start more ranks"
            )
        self._timeout = timedelta(seconds=timeout_s)
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
        one, tp_, cp_, dp_, pp_ = (self._group(axes) for axes in ((), ("tp",), ("cp",), ("dp",), ("pp",)))
        dp_cp, model, everyone = self._group(("cp", "dp")), self._group(("tp", "pp")), self._group(AXES)
        ends = self._ends_of_pipelines()
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
            pos_embd=self._group(()) if self.grid.coordinate("pp") == 0 else None,
            ep=one,
            expt_tp=tp_,
            expt_dp=dp_cp,
            intra_expt_dp=dp_cp,
            tp_ep=tp_,
            tp_ep_pp=model,
            intra_dist_opt=everyone,
            inter_dist_opt=None,
        )

    def _group(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        return self._make(self.grid.enumerate(axes))

    def _make(self, enumeration: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
        if enumeration not in self._made:
            group, _ = dist.new_subgroups_by_enumeration(
                [list(ranks) for ranks in enumeration], backend=platform.backend(), timeout=self._timeout
            )
            self._made[enumeration] = group
        return self._made[enumeration]

    def _ends_of_pipelines(self) -> dist.ProcessGroup | None:
        """First and last stage share a tied embedding; ranks between them are in no such group."""
        pipelines = self.grid.enumerate(("pp",))
        ends = self._make(tuple(tuple(dict.fromkeys((ranks[0], ranks[-1]))) for ranks in pipelines))
        return ends if self.grid.coordinate("pp") in (0, self.grid.pp - 1) else None

    def seed(self, seed: int) -> None:
        """Seed Megatron's one random-state tracker, and make the one scratch buffer that it keeps for the process."""
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        tp_rank = self.grid.coordinate("tp")
        model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=tp_rank)

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        return self.collection.dp_cp

    @property
    def world(self) -> dist.ProcessGroup:
        """Every rank of this model."""
        return self.collection.intra_dist_opt

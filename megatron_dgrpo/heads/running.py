"""Running statistics of softmax distributions, vocabulary tile by vocabulary tile, and their merge over shards.

With a, b the student's and the teacher's logits over the temperature, m, n their running maxima, and all of a, b taken
relative to these, a row's state is

    S = sum e^a    U = sum e^a a    St = sum e^b    D = sum e^a (a - b)    F = sum e^b (b - a)

A new tile first raises the maxima, and every sum is rescaled by the *old* values. With dm = m_old - m_new and
dn = n_old - n_new:

    (S, St, U, D, F) <- (e^dm S, e^dn St, e^dm (U + S dm), e^dm (D + S (dm - dn)), e^dn (F + St (dn - dm)))

Two shards merge by the same rule, with the larger maximum as the new one: one MAX and one SUM. The maxima start at a
finite number, because a shard without any column must merge without inf - inf.

A NaN or an infinite logit makes a sum NaN, or leaves it 0, and so is seen on every rank after the SUM.

Legend: _T rows, _C rows of a chunk, _V columns of a tile, _K quantities.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

LOWEST = -1e30
"""Where maxima start. Every finite logit is above it, and its differences to logits are finite in float32."""


class Running:
    """State of one run of the vocabulary: some of the above, each `[T]`."""

    def __init__(self, names: Collection[str], num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.maxima = tuple(name for name in ("m", "n") if name in names)
        self.sums = tuple(name for name in ("S", "U", "St", "D", "F") if name in names)
        self.max_KT = torch.full((len(self.maxima), num_rows), LOWEST, dtype=dtype, device=device)
        self.sum_KT = torch.zeros(len(self.sums), num_rows, dtype=dtype, device=device)

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of some rows' state, by name."""
        maxima = {name: self.max_KT[i, start:stop] for i, name in enumerate(self.maxima)}
        return maxima | {name: self.sum_KT[i, start:stop] for i, name in enumerate(self.sums)}

    def __getitem__(self, name: str) -> Tensor:
        return self.max_KT[self.maxima.index(name)] if name in self.maxima else self.sum_KT[self.sums.index(name)]

    def raise_to(self, max_KT: Tensor) -> None:
        """Take larger maxima."""
        rescale(self.rows(0, max_KT.shape[1]), dict(zip(self.maxima, max_KT, strict=True)))
        self.max_KT.copy_(max_KT)


def rescale(state: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> None:
    """All sums relative to new maxima, which are not stored."""
    down = {name: state[name] - new_T for name, new_T in maxima.items()}  # dm, dn
    if "D" in state:
        state["D"].addcmul_(state["S"], down["m"] - down["n"])
    if "F" in state:
        state["F"].addcmul_(state["St"], down["n"] - down["m"])
    if "U" in state:
        state["U"].addcmul_(state["S"], down["m"])
    for name, sums in (("m", ("S", "U", "D")), ("n", ("St", "F"))):
        if name in down:
            scale_T = down[name].exp()
            for each in sums:
                if each in state:
                    state[each].mul_(scale_T)


def add_tile(
    state: Mapping[str, Tensor], a_CV: Tensor | None, b_CV: Tensor | None, scratch: tuple[Tensor, Tensor]
) -> None:
    """One tile into the state; the logits stay. All that has a tile's size is written into the two scratch tensors."""
    one_CV, two_CV = scratch
    maxima = {}
    if a_CV is not None:
        maxima["m"] = torch.maximum(state["m"], a_CV.amax(1))
    if b_CV is not None:
        maxima["n"] = torch.maximum(state["n"], b_CV.amax(1))
    rescale(state, maxima)
    if a_CV is not None:
        torch.sub(a_CV, maxima["m"][:, None], out=one_CV)
        torch.exp(one_CV, out=two_CV)
        state["S"].add_(two_CV.sum(1))
        if "U" in state:
            state["U"].add_(row_dot(two_CV, one_CV))
        if "D" in state or "F" in state:
            assert b_CV is not None
            torch.sub(a_CV, b_CV, out=one_CV).sub_((maxima["m"] - maxima["n"])[:, None])
            if "D" in state:
                state["D"].add_(row_dot(two_CV, one_CV))
    if b_CV is not None:
        torch.sub(b_CV, maxima["n"][:, None], out=two_CV).exp_()
        state["St"].add_(two_CV.sum(1))
        if "F" in state:
            state["F"].sub_(row_dot(two_CV, one_CV))
    for name, max_C in maxima.items():
        state[name].copy_(max_C)


def row_dot(x_CV: Tensor, y_CV: Tensor) -> Tensor:
    return torch.linalg.vecdot(x_CV, y_CV)


def merge(runs: Sequence[Running], extra_KT: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Merge the shards' states in place and add up `extra_KT` on the way: two collectives for any number of rows."""
    if group is None or group.size() == 1 or extra_KT.shape[1] == 0:
        return extra_KT
    max_KT = torch.cat([run.max_KT for run in runs])
    dist.all_reduce(max_KT, op=dist.ReduceOp.MAX, group=group)
    for run, part_KT in zip(runs, max_KT.split([len(run.maxima) for run in runs]), strict=True):
        run.raise_to(part_KT)
    sum_KT = torch.cat([*(run.sum_KT for run in runs), extra_KT])
    dist.all_reduce(sum_KT, group=group)
    *parts, extra_KT = sum_KT.split([*(len(run.sums) for run in runs), extra_KT.shape[0]])
    for run, part_KT in zip(runs, parts, strict=True):
        run.sum_KT.copy_(part_KT)
    return extra_KT

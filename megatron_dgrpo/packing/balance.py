"""Trees to micro-batches, and micro-batches to data-parallel ranks.

Micro-batches are bounded by tokens, but ranks wait for each other's FLOPs, and attention makes the one no measure of
the other. So: best fit, longest first, makes few and full micro-batches; the costliest go first to the rank with the
least to do; then single trees and pairs of trees change places between the rank with the most to do and the others, as
long as that lowers the most; where all are full, the rank with the least gets one more. Everything is deterministic:
each rank finds the same result for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dgrpo.packing.cost import Cost
from megatron_dgrpo.packing.trees import Tree

_ROUNDS = 2000
"""At most so many exchanges; each lowers the greatest load, and tens are usual."""
_GOOD_ENOUGH = 1e-3
"""Of the mean load."""
_TOLERABLE = 0.03
"""Of the mean load. A load above it is worth a micro-batch that is not full: ranks wait for FLOPs, not for tokens."""
_CANDIDATES = 48
"""Trees of a micro-batch that are tried, evenly spaced by cost where it has more."""


@dataclass
class MicroBatch:
    """Trees that are computed together."""

    trees: list[int] = field(default_factory=list)  # indices
    tokens: int = 0


def balance(trees: Sequence[Tree], *, num_ranks: int, room: int, cost: Cost) -> list[list[list[Tree]]]:
    """Micro-batches of each rank, the costliest first: ranks that meet in each one then wait least."""
    tokens = [tree.num_tokens for tree in trees]
    costs = [cost.of(tree) for tree in trees]
    batches = _fill(trees, tokens, room)
    price = lambda batch: sum(costs[i] for i in batch.trees)  # noqa: E731
    ranks: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for batch in sorted(batches, key=lambda b: (-price(b), b.trees)):
        lightest = loads.index(min(loads))
        ranks[lightest].append(batch)
        loads[lightest] += price(batch)
    if len(batches) < num_ranks:
        _spread(ranks, loads, tokens, costs, room)
    _improve(ranks, loads, tokens, costs, room)
    in_order = lambda batch: sorted((trees[i] for i in batch.trees), key=lambda tree: tree.order)  # noqa: E731
    return [[in_order(b) for b in sorted(rank, key=lambda b: (-price(b), b.trees)) if b.trees] for rank in ranks]


def _fill(trees: Sequence[Tree], tokens: Sequence[int], room: int) -> list[MicroBatch]:
    """Best fit, longest first."""
    batches: list[MicroBatch] = []
    for i in sorted(range(len(trees)), key=lambda i: (-tokens[i], trees[i].order)):
        fitting = [batch for batch in batches if room - batch.tokens >= tokens[i]]
        best = max(fitting, key=lambda batch: batch.tokens, default=None)
        if best is None:
            batches.append(best := MicroBatch())
        best.trees.append(i)
        best.tokens += tokens[i]
    return batches


def _spread(
    ranks: list[list[MicroBatch]], loads: list[float], tokens: Sequence[int], costs: Sequence[float], room: int
) -> None:
    """With fewer micro-batches than ranks: the costliest tree first to the rank with the least to do."""
    items = sorted((i for rank in ranks for batch in rank for i in batch.trees), key=lambda i: (-costs[i], i))
    for rank in ranks:
        rank[:] = [MicroBatch()]
    loads[:] = [0.0] * len(ranks)
    for i in items:
        lightest = loads.index(min(loads))
        if ranks[lightest][-1].tokens + tokens[i] > room:
            ranks[lightest].append(MicroBatch())
        _put(ranks[lightest][-1], i, tokens)
        loads[lightest] += costs[i]


def _put(batch: MicroBatch, tree: int, tokens: Sequence[int]) -> None:
    batch.trees.append(tree)
    batch.tokens += tokens[tree]


def _take(batch: MicroBatch, tree: int, tokens: Sequence[int]) -> None:
    batch.trees.remove(tree)
    batch.tokens -= tokens[tree]


def _improve(
    ranks: list[list[MicroBatch]], loads: list[float], tokens: Sequence[int], costs: Sequence[float], room: int
) -> None:
    for _ in range(_ROUNDS):
        heaviest = loads.index(max(loads))
        if loads[heaviest] * len(loads) <= sum(loads) * (1 + _GOOD_ENOUGH):
            return
        found = None
        for other in sorted(range(len(ranks)), key=lambda r: loads[r]):
            if other != heaviest:
                found = _exchange(ranks[heaviest], ranks[other], loads[heaviest] - loads[other], tokens, costs, room)
            if found:
                break
        if not found:
            lightest = loads.index(min(loads))
            if loads[heaviest] * len(loads) <= sum(loads) * (1 + _TOLERABLE) or not all(
                b.trees for b in ranks[lightest]
            ):
                return
            ranks[lightest].append(MicroBatch())  # room for what fits nowhere else
            continue
        giver, given, taker, taken = found
        _take(giver, given, tokens)
        _put(taker, given, tokens)
        moved = costs[given]
        if taken is not None:
            _take(taker, taken, tokens)
            _put(giver, taken, tokens)
            moved -= costs[taken]
        loads[heaviest] -= moved
        loads[other] += moved


def _exchange(
    heavy: list[MicroBatch],
    light: list[MicroBatch],
    gap: float,
    tokens: Sequence[int],
    costs: Sequence[float],
    room: int,
) -> tuple[MicroBatch, int, MicroBatch, int | None] | None:
    """The exchange that brings two ranks closest together, if one does so by more than a thousandth of their gap."""
    best, best_gap = None, gap * 0.999
    for giver in heavy:
        for given in _candidates(giver, costs):
            for taker in light:
                for taken in (None, *_candidates(taker, costs)):
                    back = 0 if taken is None else tokens[taken]
                    moved = costs[given] - (0.0 if taken is None else costs[taken])
                    after = abs(gap - 2 * moved)
                    if moved <= 0 or after >= best_gap:
                        continue
                    if taker.tokens + tokens[given] - back <= room and giver.tokens - tokens[given] + back <= room:
                        best, best_gap = (giver, given, taker, taken), after
    return best


def _candidates(batch: MicroBatch, costs: Sequence[float]) -> list[int]:
    if len(batch.trees) <= _CANDIDATES:
        return batch.trees
    by_cost = sorted(batch.trees, key=lambda i: (costs[i], i))
    return [by_cost[k * (len(by_cost) - 1) // (_CANDIDATES - 1)] for k in range(_CANDIDATES)]

"""Which context-parallel rank holds which tokens of a micro-batch.

A trunk is cut into 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r ("zig-zag"): under causal attention the one
is as much cheaper as the other is dearer. Branches follow each other on a line that is cut where a rank has its share
of the cost, so that few branches are in two parts and any number of branches serves any number of ranks. Other ranks
see the keys of trunks and of all parts of a branch but its last. These are *shared*, and every rank holds its shared
tokens first, so that what it sends lies side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dgrpo.packing.cost import Cost
from megatron_dgrpo.packing.layout import Span, TreeSpans
from megatron_dgrpo.packing.trees import Tree

TRUNK = -1
_SLACK = 0.004
"""A branch stays whole if that gives its rank at most so much more than its share of the whole cost."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a trunk or a branch that one rank holds."""

    tree: int
    branch: int  # TRUNK, or the branch's number in its tree
    order: int  # the segment's number in its trunk or branch
    place: Span  # in the micro-batch
    rank: int
    shared: bool
    local: Span = Span(0, 0)  # among the rank's tokens


def spans_of(trees: Sequence[Tree]) -> tuple[TreeSpans, ...]:
    """The numbering of a micro-batch: tree after tree, the trunk and then the branches."""
    result, start = [], 0
    for tree in trees:
        parts = []
        for run in (tree.trunk, *tree.branches):
            parts.append(Span(start, len(run)))
            start += len(run)
        result.append(TreeSpans(parts[0], tuple(parts[1:])))
    return tuple(result)


def deal(trees: Sequence[TreeSpans], *, cp: int, unit: int, cost: Cost) -> list[Segment]:
    """All tokens, dealt to `cp` ranks. Branches are cut at multiples of `unit` tokens."""
    if cp == 1:
        runs = [(t, b, span) for t, tree in enumerate(trees) for b, span in enumerate((tree.trunk, *tree.branches), -1)]
        return [Segment(t, b, 0, span, 0, False, span) for t, b, span in runs]
    segments, loads = _trunks(trees, cp, cost)
    segments += _branches(trees, cp, unit, cost, loads)
    return _lay_out(segments, cp)


def _trunks(trees: Sequence[TreeSpans], cp: int, cost: Cost) -> tuple[list[Segment], list[float]]:
    segments, loads = [], [0.0] * cp
    for t, tree in enumerate(trees):
        size, more = divmod(tree.trunk.length, 2 * cp)
        first = 0
        for chunk in range(2 * cp):
            length = size + (chunk < more)
            if length == 0:
                break
            rank = min(chunk, 2 * cp - 1 - chunk)
            segments.append(Segment(t, TRUNK, chunk, Span(tree.trunk.start + first, length), rank, True))
            loads[rank] += cost.of_trunk(first, length)
            first += length
    return segments, loads


def _branches(trees: Sequence[TreeSpans], cp: int, unit: int, cost: Cost, loads: list[float]) -> list[Segment]:
    """The line of all branches, cut where a rank is full."""
    price = lambda t, b, first, length: cost.of_branch(trees[t].trunk.length, first, length)  # noqa: E731
    line = [(t, b, span) for t, tree in enumerate(trees) for b, span in enumerate(tree.branches)]
    share = (sum(loads) + sum(price(t, b, 0, span.length) for t, b, span in line)) / cp
    segments: list[Segment] = []
    rank = 0
    for t, b, span in line:
        first = order = 0
        while first < span.length:
            left = span.length - first
            room = share - loads[rank]
            length = left
            if rank < cp - 1 and price(t, b, first, left) > room + _SLACK * share:
                length = _affordable(lambda n, f=first: price(t, b, f, n), room, left)  # type: ignore[misc] # noqa: B023
                length = length // unit * unit
            if length == 0:
                rank += 1
                continue
            last = first + length == span.length
            segments.append(Segment(t, b, order, Span(span.start + first, length), rank, not last))
            loads[rank] += price(t, b, first, length)
            first, order = first + length, order + 1
    return segments


def _affordable(price, room: float, most: int) -> int:  # type: ignore[no-untyped-def]
    """The greatest number of tokens, up to `most`, whose price is within the room."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price(middle) <= room else (low, middle - 1)
    return low


def _lay_out(segments: Sequence[Segment], cp: int) -> list[Segment]:
    """Shared tokens first on each rank, and then in the micro-batch's order."""
    start = [0] * cp
    result = []
    for segment in sorted(segments, key=lambda s: (not s.shared, s.place.start)):
        result.append(replace(segment, local=Span(start[segment.rank], segment.place.length)))
        start[segment.rank] += segment.place.length
    return result

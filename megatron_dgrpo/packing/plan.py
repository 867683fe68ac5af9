"""From the tokens that ranks hold to the calls that attention makes.

A segment sees itself causally, the earlier segments of its trunk or branch in full, and, if it belongs to a branch, the
whole trunk in full. Neighbouring spans become one: without context parallelism a tree takes one causal call for the
trunk, one call for all branches on the trunk, and one causal call for each branch (or run of branches of one length).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from megatron_dgrpo.packing.layout import AttentionPlan, Call, Piece, Span
from megatron_dgrpo.packing.shards import TRUNK, Segment

PIECE_TOKENS = 4096
"""Tokens of each rank whose keys and values travel at one time."""


def attention_plan(
    segments: Sequence[Segment], *, rank: int, cp: int, piece_tokens: int = PIECE_TOKENS
) -> AttentionPlan:
    mine = sorted((s for s in segments if s.rank == rank), key=lambda s: s.local)
    by_tree: dict[int, list[Segment]] = {}
    for segment in mine:
        by_tree.setdefault(segment.tree, []).append(segment)
    here = [call for _, call in _merged((rank, query, key.local) for key in mine for query in _seen_by(key, by_tree))]
    pieces = _pieces(segments, by_tree, rank, piece_tokens) if cp > 1 else ()
    return AttentionPlan((*_on_themselves(mine), *here), pieces)


def _on_themselves(mine: Sequence[Segment]) -> list[Call]:
    """Causal calls; neighbours of one length are one call of several parts."""
    calls: list[Call] = []
    for span in (segment.local for segment in mine):
        last = calls[-1] if calls else None
        if last is not None and last.query.stop == span.start and last.query.length == last.count * span.length:
            both = Span(last.query.start, last.query.length + span.length)
            calls[-1] = Call(both, both, causal=True, count=last.count + 1)
        else:
            calls.append(Call(span, span, causal=True))
    return calls


def _sees(query: Segment, key: Segment) -> bool:
    """Whether all of one segment sees all of another of its tree."""
    if query.branch == key.branch:
        return query.order > key.order
    return key.branch == TRUNK


def _seen_by(key: Segment, by_tree: Mapping[int, Sequence[Segment]]) -> list[Span]:
    return join(query.local for query in by_tree.get(key.tree, ()) if _sees(query, key))


def join(spans: Iterable[Span]) -> list[Span]:
    """Ascending spans, neighbours as one."""
    result: list[Span] = []
    for span in spans:
        if result and result[-1].stop == span.start:
            result[-1] = Span(result[-1].start, result[-1].length + span.length)
        else:
            result.append(span)
    return result


def _merged(seen: Iterable[tuple[int, Span, Span]]) -> list[tuple[int, Call]]:
    """Calls from (rank of the keys, queries, keys): for the same queries, neighbouring keys are one span."""
    keys: dict[tuple[int, Span], list[Span]] = {}
    for rank, query, key in seen:
        keys.setdefault((rank, query), []).append(key)
    return [(rank, Call(query, key)) for (rank, query), spans in keys.items() for key in join(sorted(spans))]


def _pieces(
    segments: Sequence[Segment], by_tree: Mapping[int, Sequence[Segment]], rank: int, piece_tokens: int
) -> tuple[Piece, ...]:
    """Equal windows over what the ranks share, and the calls on what the others send in each."""
    shared = [s for s in segments if s.shared]
    longest = max((s.local.stop for s in shared), default=0)
    count = -(-longest // piece_tokens)
    size = -(-longest // count) if count else 0
    remote = [(key, _seen_by(key, by_tree)) for key in shared if key.rank != rank]
    pieces = []
    for number in range(count):
        window = Span(number * size, size)
        seen = (
            (key.rank, query, part.moved(-window.start))
            for key, queries in remote
            if (part := key.local.overlap(window)).length
            for query in queries
        )
        pieces.append(Piece(window, tuple(_merged(seen))))
    return tuple(pieces)

"""Trees to micro-batches: the layout records of one rank, put together from shares, shards and attention plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_dgrpo.packing.balance import balance
from megatron_dgrpo.packing.cost import Cost
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.packing.plan import PIECE_TOKENS, attention_plan
from megatron_dgrpo.packing.shards import deal, spans_of
from megatron_dgrpo.packing.trees import Tree, cut_to_fit

PADDING_TOKEN = 0


def micro_batches(
    trees: Sequence[Tree],
    *,
    max_tokens: int,
    rank: int = 0,
    size: int = 1,
    cp_rank: int = 0,
    cp: int = 1,
    multiple_of: int = 1,
    rounds_of: int = 1,
    cost: Cost = Cost(),
    piece_tokens: int = PIECE_TOKENS,
) -> list[Layout]:
    """The micro-batches of one of `size` data-parallel ranks, as one of its `cp` context-parallel ranks holds them.

    A micro-batch has at most `max_tokens` tokens on all of its context-parallel ranks together, and each of them pads
    what it holds to a multiple of `multiple_of`. All data-parallel ranks have as many micro-batches, and a multiple of
    `rounds_of`: experts are shared by data-parallel ranks, which therefore meet in every layer of every micro-batch,
    and virtual pipeline stages take micro-batches in rounds. What a rank lacks is made up for by padding.
    """
    room = max_tokens // multiple_of * multiple_of
    fitting = cut_to_fit(trees, room, setting=f"micro_batch_tokens={max_tokens}")
    shares = balance(fitting, num_ranks=size, room=room, cost=cost)
    count = -(-max(1, *(len(share) for share in shares)) // rounds_of) * rounds_of
    mine = shares[rank] + [[]] * (count - len(shares[rank]))
    return [_layout(members, cp_rank, cp, multiple_of, cost, piece_tokens) for members in mine]


def _layout(trees: Sequence[Tree], cp_rank: int, cp: int, multiple_of: int, cost: Cost, piece_tokens: int) -> Layout:
    """One micro-batch as one context-parallel rank holds it. Padding comes last and is seen by nothing."""
    spans = spans_of(trees)
    segments = deal(spans, cp=cp, unit=multiple_of, cost=cost)
    mine = sorted((s for s in segments if s.rank == cp_rank), key=lambda s: s.local)
    place = _join([np.arange(s.place.start, s.place.stop) for s in mine])
    padding = -len(place) % multiple_of or (multiple_of if len(place) == 0 else 0)
    tokens, positions, hidden, target, stream = _whole(trees)
    owned = np.full(len(tokens), -1)  # this rank's index of each token of the micro-batch
    owned[place] = np.arange(len(place))
    rows = np.flatnonzero(owned[hidden] >= 0)
    pad = lambda x, value: np.concatenate([x, np.full(padding, value, np.int64)])  # noqa: E731
    return Layout(
        tokens_S=pad(tokens[place], PADDING_TOKEN),
        positions_S=pad(positions[place], 0),
        place_S=pad(place, -1),
        trees=spans,
        attention=attention_plan(segments, rank=cp_rank, cp=cp, piece_tokens=piece_tokens),
        num_padding=padding,
        row_hidden_R=owned[hidden[rows]],
        row_target_R=target[rows],
        row_stream_R=stream[rows],
    )


def _whole(trees: Sequence[Tree]) -> tuple[np.ndarray, ...]:
    """Tokens and positions of the whole micro-batch, and its loss rows: hidden state, target, stream index."""
    tokens, positions, hidden, target, stream = [], [], [], [], []
    start = 0
    for tree in trees:
        trunk_end = start + len(tree.trunk) - 1
        for number, run in enumerate((tree.trunk, *tree.branches)):
            tokens.append(run.tokens_T)
            positions.append(np.arange(len(run)) + (len(tree.trunk) if number else 0))
            hidden.append(np.where(run.targets_K == 0, trunk_end, start + run.targets_K - 1))
            target.append(run.tokens_T[run.targets_K])
            stream.append(run.first_stream + np.arange(len(run.targets_K)))
            start += len(run)
    return tuple(_join(parts) for parts in (tokens, positions, hidden, target, stream))


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])  # also right for no parts

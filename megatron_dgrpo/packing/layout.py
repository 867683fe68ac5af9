"""The layout record: everything about a micro-batch that is not a weight, listed explicitly.

Legend: _S tokens of the micro-batch on this rank, _R loss rows of the micro-batch on this rank.

A micro-batch is a list of trees. A tree is a trunk (a prompt, or a whole document) and its branches (the responses to
the prompt): a token of a branch sees the trunk and the tokens before it in its own branch, and its position continues
where the trunk ends. A document without branches is a tree as well.

There is no label shift anywhere. A loss row says: the hidden state at `row_hidden_R[i]` predicts the token
`row_target_R[i]`, and what the algorithm knows about it (advantage, old log-prob, weights) is found at
`row_stream_R[i]` of the streams. The last token of a trunk predicts the first token of *every* branch, so several rows
may share a hidden state.

Attention is told by `attention` which tokens see each other, and rotary embeddings by `positions_S` where a token
stands in its sequence, so tokens may lie in any order on any rank of a context-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class Span:
    """Consecutive tokens."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.length)

    def overlap(self, other: Span) -> Span:
        """The tokens in both (of length 0 where there are none)."""
        start = max(self.start, other.start)
        return Span(start, max(0, min(self.stop, other.stop) - start))

    def moved(self, by: int) -> Span:
        return Span(self.start + by, self.length)


@dataclass(frozen=True)
class TreeSpans:
    """Where a tree's tokens are in its micro-batch."""

    trunk: Span
    branches: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Call:
    """Queries of this rank that see certain keys: all of them, or (causal) those up to their own place.

    With `count` above 1, queries and keys are so many equal parts that see nothing of each other.
    """

    query: Span
    key: Span
    causal: bool = False
    count: int = 1


@dataclass(frozen=True)
class Piece:
    """Keys and values that every rank of a context-parallel group sends to all others at one time."""

    window: Span  # tokens of each rank; what lies beyond the tokens of a rank is sent as zeros
    calls: tuple[tuple[int, Call], ...]  # the rank that the keys come from; key spans count from the window's start


@dataclass(frozen=True)
class AttentionPlan:
    """Every pair of a query of this rank and a key that it sees is in exactly one call.

    The causal calls come first, and each token that is no padding is in the queries of exactly one of them.
    """

    calls: tuple[Call, ...]  # on this rank's own keys
    pieces: tuple[Piece, ...] = ()  # on other ranks' keys; as many, with the same windows, on every rank


@dataclass(frozen=True)
class Layout:
    tokens_S: np.ndarray  # int64 [s]
    positions_S: np.ndarray  # int64 [s]
    place_S: np.ndarray  # int64 [s], the token's index in the whole micro-batch; -1 for padding
    trees: tuple[TreeSpans, ...]  # of the whole micro-batch, in its own numbering: the same on every rank
    attention: AttentionPlan
    num_padding: int  # tokens at the end that pad s to the unit that the model's layout needs
    row_hidden_R: np.ndarray  # int64 [r] index into [0, s)
    row_target_R: np.ndarray  # int64 [r]
    row_stream_R: np.ndarray  # int64 [r] index into the streams

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_S)

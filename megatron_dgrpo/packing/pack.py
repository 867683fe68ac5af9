"""Trees to micro-batches: the layout records of one rank, put together from shares, shards and attention plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dgrpo.packing.balance import balance
from megatron_dgrpo.packing.cost import Cost
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.packing.plan import PIECE_TOKENS, attention_plan
from megatron_dgrpo.packing.shards import Segment, deal, spans_of
from megatron_dgrpo.packing.trees import Tree, cut_to_fit

PADDING_TOKEN = 0


@dataclass(frozen=True)
class Packing:
    """How the ranks of one model share out a batch. Every rank can say it of any other.

    A micro-batch has at most `max_tokens` tokens on all of its context-parallel ranks together, and each of them pads
    what it holds to a multiple of `multiple_of`. All data-parallel ranks have as many micro-batches, and a multiple of
    `rounds_of`: experts are shared by data-parallel ranks, which therefore meet in every layer of every micro-batch,
    and virtual pipeline stages take micro-batches in rounds. What a rank lacks is made up for by padding.
    """

    max_tokens: int
    dp: int = 1
    cp: int = 1
    multiple_of: int = 1
    rounds_of: int = 1
    cost: Cost = Cost()
    piece_tokens: int = PIECE_TOKENS

    @property
    def room(self) -> int:
        return self.max_tokens // self.multiple_of * self.multiple_of

    def micro_batches(self, trees: Sequence[Tree], *, rank: int = 0, cp_rank: int = 0) -> list[Layout]:
        """Those of one data-parallel rank, as one of its context-parallel ranks holds them."""
        shares = self._shares(trees)
        count = -(-max(1, *(len(share) for share in shares)) // self.rounds_of) * self.rounds_of
        mine = shares[rank] + [[]] * (count - len(shares[rank]))
        return [_layout(members, cp_rank, self) for members in mine]

    def rows(self, trees: Sequence[Tree]) -> dict[tuple[int, int], np.ndarray]:
        """Stream indices of the loss rows of each (data-parallel, context-parallel) rank."""
        found: dict[tuple[int, int], list[np.ndarray]] = {(d, c): [] for d in range(self.dp) for c in range(self.cp)}
        for rank, share in enumerate(self._shares(trees)):
            for members in share:
                _, _, hidden, _, stream = _whole(members)
                owner = np.empty(sum(tree.num_tokens for tree in members), np.int64)
                for segment in self.deal(members):
                    owner[segment.place.slice] = segment.rank
                for cp_rank in range(self.cp):
                    found[rank, cp_rank].append(stream[owner[hidden] == cp_rank])
        return {place: _join(parts) for place, parts in found.items()}

    def deal(self, trees: Sequence[Tree]) -> list[Segment]:
        """The tokens of one micro-batch to the context-parallel ranks."""
        return deal(spans_of(trees), cp=self.cp, unit=self.multiple_of, cost=self.cost)

    def _shares(self, trees: Sequence[Tree]) -> list[list[list[Tree]]]:
        fitting = cut_to_fit(trees, self.room, setting=f"micro_batch_tokens={self.max_tokens}")
        return balance(fitting, num_ranks=self.dp, room=self.room, cost=self.cost)


def _layout(trees: Sequence[Tree], cp_rank: int, packing: Packing) -> Layout:
    """One micro-batch as one context-parallel rank holds it. Padding comes last and is seen by nothing."""
    segments, unit = packing.deal(trees), packing.multiple_of
    mine = sorted((s for s in segments if s.rank == cp_rank), key=lambda s: s.local)
    place = _join([np.arange(s.place.start, s.place.stop) for s in mine])
    padding = -len(place) % unit or (unit if len(place) == 0 else 0)
    tokens, positions, hidden, target, stream = _whole(trees)
    owned = np.full(len(tokens), -1)  # this rank's index of each token of the micro-batch
    owned[place] = np.arange(len(place))
    rows = np.flatnonzero(owned[hidden] >= 0)
    pad = lambda x, value: np.concatenate([x, np.full(padding, value, np.int64)])  # noqa: E731
    return Layout(
        tokens_S=pad(tokens[place], PADDING_TOKEN),
        positions_S=pad(positions[place], 0),
        place_S=pad(place, -1),
        trees=spans_of(trees),
        attention=attention_plan(segments, rank=cp_rank, cp=packing.cp, piece_tokens=packing.piece_tokens),
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

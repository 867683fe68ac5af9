"""Trajectories and examples to micro-batches: one sequence each, several sequences to a micro-batch.

The stream index of a loss token counts the loss tokens of the whole batch, sequence by sequence in the batch's order,
and token by token within a sequence. Every rank numbers the whole batch alike and then packs its own share of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dgrpo.errors import DataError, listing
from megatron_dgrpo.packing.layout import Document, Layout
from megatron_dgrpo.packing.trajectory import Trajectory

PADDING_TOKEN = 0


@dataclass(frozen=True)
class PackedSequence:
    """A document with its loss rows: the tokens at `targets_K` are predicted from the ones before them."""

    name: str
    tokens_T: np.ndarray
    targets_K: np.ndarray
    first_stream: int


def sequence(name: str, tokens_T: np.ndarray, trained_T: np.ndarray, first_stream: int) -> PackedSequence:
    """A sequence whose tokens marked in `trained_T` are loss rows; the first token can't be one."""
    targets_K = np.flatnonzero(trained_T)
    if len(targets_K) == 0 or targets_K[0] == 0:
        what = "has no token to train on" if len(targets_K) == 0 else "has no prompt before its first trained token"
        raise DataError(f"{name} {what}: a response needs at least one token, and a prompt before it")
    return PackedSequence(name, tokens_T.astype(np.int64), targets_K.astype(np.int64), first_stream)


def from_trajectories(trajectories: Iterable[Trajectory]) -> list[PackedSequence]:
    """One sequence per response, numbered in the order given."""
    sequences, stream = [], 0
    for trajectory in trajectories:
        parts = [trajectory.prompt_tokens, *(s.tokens for s in trajectory.segments)]
        trained = [
            np.zeros(len(trajectory.prompt_tokens), bool),
            *(np.full(len(s.tokens), s.trained) for s in trajectory.segments),
        ]
        name = f"sample {trajectory.sample} of prompt {trajectory.prompt_id}"
        sequences.append(sequence(name, np.concatenate(parts), np.concatenate(trained), stream))
        stream += trajectory.num_loss_tokens
    return sequences


def share(sequences: Sequence[PackedSequence], rank: int, size: int) -> list[PackedSequence]:
    """The sequences of one data-parallel rank: longest first to whoever has the fewest tokens so far."""
    load, mine = np.zeros(size, np.int64), []
    for item in sorted(sequences, key=lambda s: (-len(s.tokens_T), s.first_stream)):
        owner = int(load.argmin())
        load[owner] += len(item.tokens_T)
        if owner == rank:
            mine.append(item)
    return sorted(mine, key=lambda s: s.first_stream)


def micro_batches(
    sequences: Sequence[PackedSequence],
    *,
    rank: int,
    size: int,
    max_tokens: int,
    multiple_of: int = 1,
    rounds_of: int = 1,
) -> list[Layout]:
    """One data-parallel rank's micro-batches. All ranks have as many, and a multiple of `rounds_of`.

    Experts are shared by data-parallel ranks, which therefore meet in every layer of every micro-batch, and virtual
    pipeline stages take micro-batches in rounds. What a rank lacks is made up for by micro-batches of padding.
    """
    bins = [_bins(share(sequences, other, size), max_tokens, multiple_of) for other in range(size)]
    count = -(-max(1, *(len(members) for members in bins)) // rounds_of) * rounds_of
    mine = bins[rank]
    return [_layout(members, multiple_of) for members in [*mine, *[[]] * (count - len(mine))]]


def pack(sequences: Sequence[PackedSequence], *, max_tokens: int, multiple_of: int = 1) -> list[Layout]:
    """Micro-batches of at most `max_tokens`, each padded to a multiple; at least one, so that no rank is without."""
    return [_layout(members, multiple_of) for members in _bins(sequences, max_tokens, multiple_of) or [[]]]


def _bins(sequences: Sequence[PackedSequence], max_tokens: int, multiple_of: int) -> list[list[PackedSequence]]:
    room = max_tokens // multiple_of * multiple_of
    too_long = [f"{s.name} has {len(s.tokens_T)} tokens" for s in sequences if len(s.tokens_T) > room]
    if too_long:
        raise DataError(
            listing(f"a micro-batch holds {room} tokens (micro_batch_tokens={max_tokens}); raise it, since:", too_long)
        )
    bins: list[list[PackedSequence]] = []
    free: list[int] = []
    for item in sorted(sequences, key=lambda s: (-len(s.tokens_T), s.first_stream)):  # best fit, longest first
        fitting = [i for i, left in enumerate(free) if left >= len(item.tokens_T)]
        if not fitting:
            bins.append([])
            free.append(room)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda i: free[i])
        bins[best].append(item)
        free[best] -= len(item.tokens_T)
    return bins


def _layout(members: Sequence[PackedSequence], multiple_of: int) -> Layout:
    """One micro-batch. Padding is a document of its own at the end, without loss rows."""
    length = sum(len(s.tokens_T) for s in members)
    padding = -length % multiple_of or (multiple_of if length == 0 else 0)
    documents, start = [], 0
    hidden, target, stream = [], [], []
    for item in members:
        documents.append(Document(start, len(item.tokens_T)))
        hidden.append(start + item.targets_K - 1)
        target.append(item.tokens_T[item.targets_K])
        stream.append(item.first_stream + np.arange(len(item.targets_K)))
        start += len(item.tokens_T)
    if padding:
        documents.append(Document(start, padding))
    join = lambda parts: np.concatenate([np.zeros(0, np.int64), *parts])  # noqa: E731 - also right for no parts
    return Layout(
        tokens_S=join([*(s.tokens_T for s in members), np.full(padding, PADDING_TOKEN, np.int64)]),
        positions_S=join([np.arange(d.length) for d in documents]),
        documents=tuple(documents),
        num_padding=padding,
        row_hidden_R=join(hidden),
        row_target_R=join(target),
        row_stream_R=join(stream),
    )

"""Checks of what ranks contribute: each box where it stands, and all of them together against the whole model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import TransferError, listing
from megatron_dgrpo.rollout.buckets import Piece, piece_shape

Box = Sequence[Sequence[int]]  # (start, stop) on every axis
_MANY = 50


class ShardReader:
    """Takes shards from an iterator no earlier than their bucket's turn comes: exporters may make them on the fly."""

    def __init__(self, shards: Iterable[WeightShard], manifest: Sequence[WeightSpec]) -> None:
        self._manifest = manifest
        self._indices = {spec.hf_name: index for index, spec in enumerate(manifest)}
        self._shards = iter(shards)
        self._ahead: tuple[int, WeightShard] | None = None
        self._open: list[tuple[int, WeightShard]] = []  # of tensors that later buckets may have more rows of
        self._last = 0

    def parts(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, Box, WeightShard]]:
        """What this rank holds of these pieces: the number of the piece, the box, and the shard that it is part of."""
        last = pieces[-1].index
        self._open = [(index, shard) for index, shard in self._open if index >= pieces[0].index]
        while (ahead := self._peek()) is not None and ahead[0] <= last:
            self._ahead = None
            self._open.append(ahead)
        of_index: dict[int, list[WeightShard]] = {}
        for index, shard in self._open:
            of_index.setdefault(index, []).append(shard)
        for number, piece in enumerate(pieces):
            for shard in of_index.get(piece.index, ()):
                if (box := part_of(shard.box, piece)) is not None:
                    yield number, box, shard

    def expect_end(self) -> None:
        assert self._peek() is None, "the last bucket reaches to the manifest's end"

    def _peek(self) -> tuple[int, WeightShard] | None:
        if self._ahead is None and (shard := next(self._shards, None)) is not None:
            self._ahead = self._check(shard), shard
        return self._ahead

    def _check(self, shard: WeightShard) -> int:
        index = self._indices.get(shard.hf_name)
        if index is None:
            raise TransferError(f"{shard.hf_name}: a shard of it came, and the manifest does not have it")
        spec, shape = self._manifest[index], tuple(shard.global_shape)
        if index < self._last:
            raise TransferError(f"{shard.hf_name}: it came after a later tensor; shards come in the manifest's order")
        wanted = tuple(spec.global_shape)
        if shape != wanted or shard.dtype != spec.dtype:
            raise TransferError(
                f"{shard.hf_name}: the shard is of {list(shape)} {shard.dtype}, "
                f"the manifest has {list(wanted)} {spec.dtype}"
            )
        inside = len(shard.box) == len(shape) and all(
            0 <= a <= b <= n for (a, b), n in zip(shard.box, shape, strict=True)
        )
        if not inside or tuple(shard.local_tensor.shape) != tuple(b - a for a, b in shard.box):
            raise TransferError(
                f"{shard.hf_name}: a local tensor of {list(shard.local_tensor.shape)} does not fill the box "
                f"{_text(shard.box)} of {list(shape)}"
            )
        self._last = index
        return index


def part_of(box: Box, piece: Piece) -> Box | None:
    """What a box has of a piece; None if nothing."""
    if not box:
        return box
    start, stop = max(box[0][0], piece.start), min(box[0][1], piece.stop)
    return ((start, stop), *box[1:]) if start < stop else None


def check_coverage(
    manifest: Sequence[WeightSpec], pieces: Sequence[Piece], ranks: Sequence[Sequence[tuple[int, Box]]]
) -> None:
    """That every element of these pieces was written by exactly one rank, once. `ranks` has what each rank wrote: the
    number of the piece, and the box."""
    written: dict[int, list[tuple[int, Box]]] = {number: [] for number in range(len(pieces))}
    for rank, boxes in enumerate(ranks):
        for number, box in boxes:
            written[number].append((rank, box))
    problems = []
    for number, boxes_of_piece in written.items():
        piece = pieces[number]
        spec = manifest[piece.index]
        overlaps = [
            f"{spec.hf_name}: rank {a}'s {_text(x)} and rank {b}'s {_text(y)} overlap"
            for (a, x), (b, y) in itertools.combinations(boxes_of_piece, 2)
            if all(max(p[0], q[0]) < min(p[1], q[1]) for p, q in zip(x, y, strict=True))
        ]
        size = math.prod(piece_shape(spec.global_shape, piece.start, piece.stop))
        missing = size - sum(math.prod(b - a for a, b in box) for _, box in boxes_of_piece)
        problems += overlaps
        if missing > 0 and not overlaps:
            where = "" if size == math.prod(spec.global_shape) else f" in rows {piece.start} to {piece.stop}"
            problems.append(f"{spec.hf_name}: {missing} of its {size} elements{where} were written by no rank")
    if problems:
        more = [f"and {len(problems) - _MANY} more"] if len(problems) > _MANY else []
        raise TransferError(listing("The ranks' shards do not make up the model:", problems[:_MANY] + more))


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"

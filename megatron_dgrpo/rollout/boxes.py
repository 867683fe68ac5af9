"""Checks of what ranks contribute: each box where it stands, and all of them together against the whole model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import TransferError, listing

Box = Sequence[Sequence[int]]  # (start, stop) on every axis
_MANY = 50


class ShardReader:
    """Takes shards from an iterator no earlier than their bucket's turn comes: exporters may make them on the fly."""

    def __init__(self, shards: Iterable[WeightShard], manifest: Sequence[WeightSpec]) -> None:
        self._manifest = manifest
        self._indices = {spec.hf_name: index for index, spec in enumerate(manifest)}
        self._shards = iter(shards)
        self._ahead: tuple[int, WeightShard] | None = None
        self._last = 0

    def up_to(self, last: int) -> Iterator[tuple[int, WeightShard]]:
        """The shards of tensors up to this index of the manifest, with their indices."""
        while (ahead := self._peek()) is not None and ahead[0] <= last:
            self._ahead = None
            yield ahead

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


def check_coverage(
    manifest: Sequence[WeightSpec], indices: Sequence[int], ranks: Sequence[Sequence[tuple[int, Box]]]
) -> None:
    """That every element of these tensors was written by exactly one rank, once. `ranks` has each rank's boxes."""
    written: dict[int, list[tuple[int, Box]]] = {index: [] for index in indices}
    for rank, boxes in enumerate(ranks):
        for index, box in boxes:
            written[index].append((rank, box))
    problems = []
    for index, boxes_of_tensor in written.items():
        spec = manifest[index]
        overlaps = [
            f"{spec.hf_name}: rank {a}'s {_text(x)} and rank {b}'s {_text(y)} overlap"
            for (a, x), (b, y) in itertools.combinations(boxes_of_tensor, 2)
            if all(max(p[0], q[0]) < min(p[1], q[1]) for p, q in zip(x, y, strict=True))
        ]
        size = math.prod(spec.global_shape)
        missing = size - sum(math.prod(b - a for a, b in box) for _, box in boxes_of_tensor)
        problems += overlaps
        if missing > 0 and not overlaps:
            problems.append(f"{spec.hf_name}: {missing} of its {size} elements were written by no rank")
    if problems:
        more = [f"and {len(problems) - _MANY} more"] if len(problems) > _MANY else []
        raise TransferError(listing("The ranks' shards do not make up the model:", problems[:_MANY] + more))


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"

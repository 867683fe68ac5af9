"""The order and the places in which tensors travel: a plan that every rank makes for itself, from the manifest alone.

The file has two slots. Bucket k lies in slot k % 2, so that one is written while the engine reads the other. A tensor
that does not fit into what is left of a bucket is cut between rows, so no slot is larger than a bucket, however large
an embedding is.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dgrpo.checkpoint.hf.shards import WeightSpec
from megatron_dgrpo.errors import TransferError, listing

NUM_SLOTS = 2
_ALIGNMENT = 64


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a tensor; a scalar is one row."""

    index: int  # into the manifest
    start: int
    stop: int
    offset: int  # in bytes, from the beginning of the file


@dataclass(frozen=True)
class Bucket:
    """Pieces one after another, in the manifest's order."""

    pieces: tuple[Piece, ...]
    slot: int


@dataclass(frozen=True)
class Plan:
    buckets: tuple[Bucket, ...]
    slot_bytes: int

    @property
    def file_bytes(self) -> int:
        return self.slot_bytes * min(NUM_SLOTS, len(self.buckets))


def rows_of(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def row_bytes(spec: WeightSpec) -> int:
    return math.prod(spec.global_shape[1:]) * spec.dtype.itemsize


def piece_shape(shape: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    return (stop - start, *shape[1:]) if shape else ()


def plan_buckets(manifest: Sequence[WeightSpec], bucket_bytes: int) -> Plan:
    """Fill buckets in order. A bucket that is smaller than one row is as large as that row."""
    names = [spec.hf_name for spec in manifest]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or not manifest:
        raise TransferError(listing("The manifest of the weights is empty, or has names twice:", twice))
    room = max(bucket_bytes, *map(row_bytes, manifest))
    contents: list[list[tuple[int, int, int, int]]] = [[]]  # (index, start, stop, offset in the slot)
    used = slot_bytes = 0
    for index, spec in enumerate(manifest):
        rows, each, start = rows_of(spec.global_shape), row_bytes(spec), 0
        while True:
            stop = rows if each == 0 else min(rows, start + max(0, room - used) // each)
            if start == stop < rows:  # not one row more
                contents.append([])
                used = 0
                continue
            contents[-1].append((index, start, stop, used))
            used += (stop - start) * each
            slot_bytes = max(slot_bytes, _aligned(used))
            used, start = _aligned(used), stop
            if start >= rows:
                break
    buckets = (_bucket(pieces, number, slot_bytes) for number, pieces in enumerate(contents))
    return Plan(tuple(buckets), slot_bytes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bucket(pieces: list[tuple[int, int, int, int]], number: int, slot_bytes: int) -> Bucket:
    slot = number % NUM_SLOTS
    return Bucket(tuple(Piece(i, start, stop, slot * slot_bytes + used) for i, start, stop, used in pieces), slot)


def map_shared(descriptor: int, num_bytes: int) -> mmap.mmap:
    """The file in memory, all pages at once: a fault for each would cost a good part of the copy."""
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

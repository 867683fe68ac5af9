"""The order and the places in which tensors travel: a plan that every rank makes for itself, from the manifest alone.

The file has two slots. Bucket k lies in slot k % 2, so that one is written while the engine reads the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dgrpo.checkpoint.hf.shards import WeightSpec
from megatron_dgrpo.errors import TransferError, listing

NUM_SLOTS = 2
_ALIGNMENT = 64


@dataclass(frozen=True)
class Bucket:
    """Whole tensors, one after another in the manifest's order."""

    indices: tuple[int, ...]  # into the manifest
    offsets: tuple[int, ...]  # from the beginning of the file
    slot: int


@dataclass(frozen=True)
class Plan:
    buckets: tuple[Bucket, ...]
    slot_bytes: int

    @property
    def file_bytes(self) -> int:
        return self.slot_bytes * min(NUM_SLOTS, len(self.buckets))


def num_bytes(spec: WeightSpec) -> int:
    count = spec.dtype.itemsize
    for size in spec.global_shape:
        count *= size
    return count


def plan_buckets(manifest: Sequence[WeightSpec], bucket_bytes: int) -> Plan:
    """Fill buckets in order; a tensor that is larger than a bucket gets one of its own, and all slots its size."""
    names = [spec.hf_name for spec in manifest]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or not manifest:
        raise TransferError(listing("The manifest of the weights is empty, or has names twice:", twice))
    contents: list[list[int]] = [[]]
    used = slot_bytes = 0
    for index, spec in enumerate(manifest):
        size = -(-num_bytes(spec) // _ALIGNMENT) * _ALIGNMENT
        if contents[-1] and used + size > bucket_bytes:
            contents.append([])
            used = 0
        contents[-1].append(index)
        used += size
        slot_bytes = max(slot_bytes, used)
    return Plan(tuple(_bucket(manifest, indices, k, slot_bytes) for k, indices in enumerate(contents)), slot_bytes)


def _bucket(manifest: Sequence[WeightSpec], indices: list[int], number: int, slot_bytes: int) -> Bucket:
    slot = number % NUM_SLOTS
    offsets, position = [], slot * slot_bytes
    for index in indices:
        offsets.append(position)
        position += -(-num_bytes(manifest[index]) // _ALIGNMENT) * _ALIGNMENT
    return Bucket(tuple(indices), tuple(offsets), slot)

"""From a trainer's weights to FP8 weights with scales, on the ranks that hold them. The format is `fp8_format`'s.

For a block B of 128 x 128 elements of a tensor w, all in float32:

    s(B) = max over B of |w| / 448        448 is the largest number of float8_e4m3fn
    q    = w / s, rounded to the nearest number of float8_e4m3fn, ties to even

so q s differs from w by at most half the distance of two neighbours of e4m3 at w / s, times s: 1/16 of |w|, or
s / 1024 where w is nearly 0. A block of zeros has s = 1. s is never below the smallest normal float32, so that nothing
overflows.

What is quantised is the value that the trainer computes with: the model's own parameter, bfloat16 or float32, and not
the optimizer's float32 master of a bfloat16 one. So the engine samples from the nearest FP8 model to the one that
log-probs are computed with.

**Sharded and whole are the same to the bit.** Ranks hold boxes that end anywhere in a block. Each computes the largest
|w| of the part of every block that it holds; a maximum over the ranks, which is exact in any order, gives all of them
all scales, and each quantises its own elements by them. Nobody sees another's weights. The scales of the whole model
are on every rank meanwhile: 1 / 16384 of its elements, 17 MB for 70 billion.

This is the only collective of a transfer. It comes before any engine is spoken to, when every rank has its weights, and
waits for nobody's rollout. A NaN or an infinity is found by it, on all ranks at once: the tensors are named, and no
byte moves. Elements are quantised later, as a bucket takes them, a row of blocks at a time.

Axes: `_NK` rows and columns of a box, `_BC` blocks of rows and of columns.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import TransferError, listing
from megatron_dgrpo.rollout.fp8_format import BLOCK, SCALE, is_quantised, num_blocks, scale_shape

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
_TINY = torch.finfo(torch.float32).tiny

Box = Sequence[Sequence[int]]
Shards = Callable[[], Iterable[WeightShard]]


def manifest_of(weights: Sequence[WeightSpec]) -> list[WeightSpec]:
    """The tensors of the FP8 model: every quantised weight, with its scales right behind it, and the others."""
    found = []
    for spec in weights:
        if is_quantised(spec.hf_name, spec.global_shape):
            found.append(spec._replace(dtype=FP8))
            found.append(WeightSpec(spec.hf_name + SCALE, scale_shape(spec.global_shape), torch.float32))
        else:
            found.append(spec)
    return found


@torch.no_grad()
def quantised(
    shards: Shards, weights: Sequence[WeightSpec], *, group: dist.ProcessGroup, device: torch.device
) -> tuple[Shards, list[WeightSpec]]:
    """What ranks of `group` hold of the FP8 model, and its manifest. Every rank calls it. The shards are good until the
    weights change: they have the elements as they are, and the scales by which `encode` makes FP8 of them."""
    manifest = manifest_of(weights)
    scales = _scales(shards(), [spec for spec in weights if is_quantised(*spec[:2])], group, device)
    order = {spec.hf_name: index for index, spec in enumerate(manifest)}
    first = dist.get_rank(group) == 0

    def of_this_rank() -> Iterator[WeightShard]:
        own = (
            shard._replace(dtype=FP8, scales=scales[shard.hf_name]) if shard.hf_name in scales else shard
            for shard in shards()
        )
        if not first:
            return own
        whole = (_whole(name + SCALE, scales_BC) for name, scales_BC in scales.items())
        return heapq.merge(own, whole, key=lambda shard: order[shard.hf_name])

    return of_this_rank, manifest


def _whole(name: str, tensor: torch.Tensor) -> WeightShard:
    shape = tuple(tensor.shape)
    return WeightShard(name, shape, tensor.dtype, tuple((0, length) for length in shape), tensor)


def _scales(
    shards: Iterable[WeightShard], weights: Sequence[WeightSpec], group: dist.ProcessGroup, device: torch.device
) -> dict[str, torch.Tensor]:
    """The scales of every quantised tensor, on all ranks."""
    shapes = {spec.hf_name: scale_shape(spec.global_shape) for spec in weights}
    flat = torch.zeros(sum(map(math.prod, shapes.values())), device=device)
    largest = dict(
        zip(
            shapes,
            (
                part.view(shape)
                for part, shape in zip(flat.split([*map(math.prod, shapes.values())]), shapes.values(), strict=True)
            ),
            strict=True,
        )
    )
    for shard in shards:
        if shard.hf_name in largest:
            _take_largest(shard.local_tensor, shard.box, largest[shard.hf_name])
    dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
    if not bool(flat.isfinite().all()):
        strange = [name for name, part in largest.items() if not bool(part.isfinite().all())]
        raise TransferError(
            listing(
                "These weights have NaN or infinite elements, which have no scale in FP8; the engines keep the weights "
                "that they have:",
                strange,
            )
        )
    flat.copy_(_scale_of(flat))
    return largest


def _scale_of(largest: torch.Tensor) -> torch.Tensor:
    by = largest.new_tensor(LARGEST)  # a number would be multiplied by its inverse on GPUs, and round otherwise
    return torch.where(largest == 0, 1.0, (largest / by).clamp_min(_TINY))


def _rows_of_blocks(box: Box) -> Iterator[tuple[int, int, int]]:
    """A row of blocks after another: its number, and the rows of the tensor that the box has of it."""
    first, last = box[0]
    for number in range(first // BLOCK, num_blocks(last)):
        yield number, max(first, number * BLOCK), min(last, (number + 1) * BLOCK)


def _take_largest(local_NK: torch.Tensor, box: Box, largest_BC: torch.Tensor) -> None:
    """Raise the largest |w| of every block to that of the box's part of it; what is not finite counts as infinite."""
    (row, _), (left, right) = box
    for number, start, stop in _rows_of_blocks(box):
        largest_K = local_NK[start - row : stop - row].abs().amax(0).float()
        largest_K = torch.nn.functional.pad(largest_K, (left % BLOCK, -right % BLOCK))
        found_C = largest_K.unflatten(0, (-1, BLOCK)).amax(1)
        found_C = torch.where(found_C.isnan(), torch.inf, found_C)
        target_C = largest_BC[number, left // BLOCK : num_blocks(right)]
        torch.maximum(target_C, found_C, out=target_C)


@torch.no_grad()
def encode(local_NK: torch.Tensor, box: Box, scales_BC: torch.Tensor) -> torch.Tensor:
    """A box of a tensor in FP8, by the scales of the whole tensor's blocks."""
    encoded_NK = torch.empty(local_NK.shape, dtype=FP8, device=local_NK.device)
    (row, _), (left, right) = box
    for number, start, stop in _rows_of_blocks(box):
        scales_K = scales_BC[number, left // BLOCK : num_blocks(right)].repeat_interleave(BLOCK)
        wide_NK = local_NK[start - row : stop - row].float() / scales_K[left % BLOCK :][: right - left]
        encoded_NK[start - row : stop - row].copy_(wide_NK.clamp_(-LARGEST, LARGEST))
    return encoded_NK


def quantise(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole tensor as FP8 and scales."""
    box = tuple((0, length) for length in weight_NK.shape)
    largest_BC = torch.zeros(scale_shape(weight_NK.shape), device=weight_NK.device)
    _take_largest(weight_NK, box, largest_BC)
    scales_BC = _scale_of(largest_BC)
    return encode(weight_NK, box, scales_BC), scales_BC


def dequantise(weight_NK: torch.Tensor, scales_BC: torch.Tensor) -> torch.Tensor:
    """What the engine computes with, in float32."""
    scales_NK = scales_BC.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight_NK.float() * scales_NK[: weight_NK.shape[0], : weight_NK.shape[1]]

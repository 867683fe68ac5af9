"""A checksum of a tensor that can be computed box by box, on different ranks, and added up.

    c(T) = sum over the words x at row-major position i of  x * (2 i + 1)   mod 2**48

A word is an element's bits as an integer; elements of eight bytes are two words. Positions make the sum sensitive to
boxes in each other's place, and any single change is seen, since 2 i + 1 is odd; being a sum, it does not depend on
how T was cut. It is there to find mistakes, not attackers. Axes suffix: `_N` words.
"""

from __future__ import annotations

import math

import torch

MODULUS = 2**48
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_CHUNK = 1 << 22
"""Elements at a time: sixteen bytes each are in flight."""


def partial_checksum(
    local_tensor: torch.Tensor, box: tuple[tuple[int, int], ...], global_shape: tuple[int, ...]
) -> int:
    """What the part `box` of a tensor adds to its checksum."""
    if not box:
        return _part(local_tensor, (), (), 0)
    num_rows = local_tensor.shape[0]
    step = max(1, _CHUNK // max(1, local_tensor.numel() // max(1, num_rows)))
    return sum(_part(local_tensor[r : r + step], box, global_shape, r) for r in range(0, num_rows, step)) % MODULUS


def checksum(tensor: torch.Tensor) -> int:
    """The checksum of a whole tensor."""
    shape = tuple(tensor.shape)
    return partial_checksum(tensor, tuple((0, n) for n in shape), shape)


def _part(rows: torch.Tensor, box: tuple[tuple[int, int], ...], global_shape: tuple[int, ...], first: int) -> int:
    """The sum over some rows of a box, from its row `first` on."""
    index_N = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device)
    for axis, (start, _) in enumerate(box):
        begin = start + (first if axis == 0 else 0)
        along = torch.arange(begin, begin + rows.shape[axis], device=rows.device) * math.prod(global_shape[axis + 1 :])
        index_N += along.reshape([-1 if a == axis else 1 for a in range(len(box))])
    words_N = rows.contiguous().reshape(-1).view(_INTEGERS[rows.element_size()]).to(torch.int64)
    index_N = index_N.reshape(-1)
    if rows.element_size() == 8:
        index_N = torch.stack([2 * index_N, 2 * index_N + 1], 1).reshape(-1)
    return int((words_N * (2 * index_N + 1)).sum()) % MODULUS

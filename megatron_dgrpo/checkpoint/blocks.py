"""Reading parts of tensors that lie in files as plain, contiguous numbers.

Rows are read into one small buffer and copied from there to where they belong, converted on the way. Against reading
straight into place that costs nothing measurable (the buffer stays in the processor's cache, and the time goes into
the first touch of the target's pages), and it serves any type, any cut and any device. Files are read, not mapped:
what is in use is the target and the buffer, never a file's pages.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

_BUFFER_BYTES = 4 << 20

Box = tuple[tuple[int, int], ...]
"""(start, stop) on every axis."""


class Stored(NamedTuple):
    """Where a tensor's numbers lie."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Blocks:
    """Use it as a context: the files are open while it is."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read_into(self, stored: Stored, box: Box, target: torch.Tensor) -> None:
        """Fill `target`, of any type and on any device, with the part `box` of a tensor."""
        if not stored.shape:
            stored, box, target = stored._replace(shape=(1,)), ((0, 1),), target[None]
        (start, stop), row_shape = box[0], stored.shape[1:]
        row_bytes = math.prod(row_shape) * stored.dtype.itemsize
        if row_bytes > _BUFFER_BYTES and len(row_shape) > 1:  # a row is itself read in rows
            for i in range(start, stop):
                row = stored._replace(start=stored.start + i * row_bytes, shape=row_shape)
                self.read_into(row, box[1:], target[i - start])
            return
        columns = tuple(slice(*bounds) for bounds in box[1:])
        step = max(1, _BUFFER_BYTES // max(1, row_bytes))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = self._bytes(stored.file, stored.start + first * row_bytes, (last - first) * row_bytes)
            rows = block.view(stored.dtype).view(last - first, *row_shape)
            target[first - start : last - start].copy_(rows[(slice(None), *columns)])

    def _bytes(self, path: Path, offset: int, length: int) -> torch.Tensor:
        if self._buffer.numel() < length:
            self._buffer = torch.empty(
                max(length, _BUFFER_BYTES), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
        part, done = self._buffer[:length], 0
        into = memoryview(part.numpy())
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        while done < length:
            got = os.preadv(self._files[path], [into[done:]], offset + done)
            if got == 0:
                raise OSError(f"it ends at byte {offset + done}")
            done += got
        return part

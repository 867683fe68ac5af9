"""Reading parts of tensors from a folder of safetensors whose headers are known.

Rows are read into one small buffer and copied from there to where they belong, converted on the way. Against reading
straight into place that costs nothing measurable (the buffer stays in the processor's cache, and the time goes into
the first touch of the target's pages), and it serves any type, any cut and any device. Files are read, not mapped:
what is in use is the target and the buffer, never a file's pages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from megatron_dgrpo.checkpoint.hf.headers import TensorHeader
from megatron_dgrpo.errors import ConversionError

_BUFFER_BYTES = 4 << 20


class SafetensorsFolder:
    """Use it as a context: the files are open while it is."""

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        self._headers = headers
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._headers[name].dtype or "")

    def read(self, name: str, box: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """The part `box` of a tensor: (start, stop) on every axis."""
        part = torch.empty([stop - start for start, stop in box], dtype=self.dtype(name))
        self.read_into(name, box, part)
        return part

    def read_into(self, name: str, box: tuple[tuple[int, int], ...], target: torch.Tensor) -> None:
        """Fill `target`, of any type and on any device, with the part `box` of a tensor."""
        header, dtype = self._headers[name], self.dtype(name)
        row_shape = header.shape[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        (start, stop), columns = box[0], tuple(slice(*bounds) for bounds in box[1:])
        step = max(1, _BUFFER_BYTES // max(1, row_bytes))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = self._bytes(name, header.start + first * row_bytes, (last - first) * row_bytes)
            rows = block.view(dtype).view(last - first, *row_shape)
            target[first - start : last - start].copy_(rows[(slice(None), *columns)])

    def _bytes(self, name: str, offset: int, length: int) -> torch.Tensor:
        if self._buffer.numel() < length:
            self._buffer = torch.empty(
                max(length, _BUFFER_BYTES), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
        part, path, done = self._buffer[:length], self._headers[name].file, 0
        into = memoryview(part.numpy())
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            while done < length:
                got = os.preadv(self._files[path], [into[done:]], offset + done)
                if got == 0:
                    raise OSError(f"it ends at byte {offset + done}")
                done += got
        except OSError as error:
            raise ConversionError(f"{name} can't be read from {path} ({error}): copy the file again") from error
        return part

"""Writing behind the caller's back: one thread that puts blocks of bytes into files, and a few buffers that go round.

Collecting the next block from other ranks and writing the last one so go on at the same time. The first error stops
all writing; the caller goes on handing over blocks, which are dropped, until it asks: other ranks still count on it
to take part in collecting.
"""

from __future__ import annotations

import os
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_dgrpo import points

BLOCK_BYTES = 8 << 20
_NUM_BUFFERS = 4


class FileWriter:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._buffers: queue.Queue[torch.Tensor] = queue.Queue()
        self._num_made = 0
        self._files: dict[Path, int] = {}
        self._error: OSError | None = None

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A block to fill and hand to `write`; waits until one is free."""
        length = dtype.itemsize
        for size in shape:
            length *= size
        if self._num_made < _NUM_BUFFERS:
            self._num_made += 1
            whole = torch.empty(0, dtype=torch.uint8)
        else:
            whole = self._buffers.get()
        if whole.numel() < length:
            whole = torch.empty(max(length, BLOCK_BYTES), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return whole[:length].view(dtype).view(shape)

    def release(self, buffer: torch.Tensor) -> None:
        """Give back a buffer that is not written."""
        self._buffers.put(_whole(buffer))

    def create(self, path: Path, size: int, header: bytes) -> None:
        self._thread.submit(self._guard, lambda: self._create(path, size, header))

    def write(self, path: Path, offset: int, block: torch.Tensor, *, is_buffer: bool) -> None:
        """Write a contiguous tensor in the host's memory; it must not change before `wait`, unless it is a buffer."""
        content = memoryview(block.detach().reshape(-1).view(torch.uint8).numpy())

        def work() -> None:
            try:
                self._guard(lambda: points.write_at("export.block", self._files[path], content, offset))
            finally:
                if is_buffer:
                    self.release(block)

        self._thread.submit(work)

    def finish(self, path: Path) -> None:
        """Everything of this file was handed over: bring it to the disk."""
        self._thread.submit(self._guard, lambda: points.sync("export.sync", self._files[path]))

    def wait(self) -> None:
        """Until all that was handed over is done; raises what went wrong."""
        self._thread.submit(lambda: None).result()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._thread.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _create(self, path: Path, size: int, header: bytes) -> None:
        self._files[path] = points.open_file("export.file", path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        points.cut("export.size", self._files[path], size)
        points.write_at("export.header", self._files[path], header, 0)

    def _guard(self, work) -> None:  # type: ignore[no-untyped-def]
        if self._error is None:
            try:
                work()
            except OSError as error:
                self._error = error


def _whole(buffer: torch.Tensor) -> torch.Tensor:
    storage = buffer.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]

"""The file that weights are put into when they come over a connection: two buckets, in the engine's own shared memory.

The engine's ranks map it and read it as they read a trainer's. It never has a name, so no way of dying leaves it
behind: they find it among this process's open files. A bucket counts as here only if all of its bytes came for it, one
after another.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from megatron_dgrpo import points
from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout.buckets import rows_of
from megatron_dgrpo.rollout.messages import BeginUpdate, LoadBucket, WeightBytes
from megatron_dgrpo.rollout.wire_receiver import num_bytes_of


class Inbox:
    def __init__(self, update: BeginUpdate) -> None:
        self._specs = {spec.name: spec for spec in update.tensors}
        self._call, self._start, self._stop = 0, 0, 0  # the bucket whose bytes come, and which of them have
        points.reached("inbox.file")
        self._descriptor = os.memfd_create("dgrpo-inbox")
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        try:
            os.posix_fallocate(self._descriptor, 0, update.num_bytes)
            self._file = np.frombuffer(mmap.mmap(self._descriptor, update.num_bytes), np.uint8)
        except (OSError, ValueError) as error:
            self.close()
            raise TransferError(
                f"The engine's machine has no room for the {update.num_bytes} bytes of two buckets ({error}): lower "
                "bucket_bytes, or give the machine or the container more memory"
            ) from None

    def close(self) -> None:
        """All who read it have mapped it. It goes with the last of them."""
        os.close(self._descriptor)

    def put(self, message: WeightBytes) -> None:
        start, stop = message.offset, message.offset + len(message.data)
        if message.data.dtype != np.uint8 or message.data.ndim != 1 or not 0 <= start <= stop <= len(self._file):
            raise TransferError(f"Bytes {start} to {stop} of weights came, for a file of {len(self._file)} bytes")
        if message.call != self._call:
            self._call, self._start, self._stop = message.call, start, start
        if start != self._stop:
            raise TransferError(f"Bytes of weights came from {start} on, which is not where they were left")
        points.reached("inbox.bytes")
        self._file[start:stop] = message.data
        self._stop = stop

    def check(self, bucket: LoadBucket) -> None:
        """That every byte of a bucket came for it."""
        spans = zip(bucket.starts, bucket.stops, strict=True) if bucket.starts else None
        for name, offset in zip(bucket.names, bucket.offsets, strict=True):
            spec = self._specs.get(name)
            if spec is None:
                raise TransferError(f"{name} was not announced")
            rows = next(spans) if spans else (0, rows_of(spec.shape))
            stop = offset + num_bytes_of(spec, *rows)
            if stop > offset and (bucket.call != self._call or offset < self._start or stop > self._stop):
                raise TransferError(f"{name}: its bytes {offset} to {stop} have not come")

"""The file that weights are put into when they come over a connection: two buckets, in the engine's own shared memory.

The engine's ranks map it and read it as they read a trainer's. It loses its name as soon as they have, so no way of
dying leaves it behind. A bucket counts as here only if all of its bytes came for it, one after another.
"""

from __future__ import annotations

import mmap
import os
import secrets

import numpy as np

from megatron_dgrpo import points
from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout.buckets import rows_of
from megatron_dgrpo.rollout.messages import BeginUpdate, LoadBucket, WeightBytes
from megatron_dgrpo.rollout.wire_receiver import num_bytes_of

_SHM = "/dev/shm"


class Inbox:
    def __init__(self, update: BeginUpdate) -> None:
        self._specs = {spec.name: spec for spec in update.tensors}
        self._call, self._start, self._stop = 0, 0, 0  # the bucket whose bytes come, and which of them have
        self.path = os.path.join(_SHM, f"dgrpo-inbox-{secrets.token_hex(6)}")
        descriptor = points.open_file("inbox.file", self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, update.num_bytes)
            self._file = np.frombuffer(mmap.mmap(descriptor, update.num_bytes), np.uint8)
        except (OSError, ValueError) as error:
            self.unlink()
            raise TransferError(
                f"{_SHM} of the engine's machine has no room for the {update.num_bytes} bytes of two buckets "
                f"({error}): lower bucket_bytes, or give the machine or the container more shared memory"
            ) from None
        finally:
            os.close(descriptor)

    def unlink(self) -> None:
        points.remove("inbox.unlink", self.path, missing_ok=True)

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

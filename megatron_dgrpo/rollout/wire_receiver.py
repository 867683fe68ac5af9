"""An engine on another machine, as a push sees it: buckets are read from the ranks' file and sent over the connection.

What happens before what is as for engines that map the file: rank 0 sends a bucket when all ranks have written it
whole, and before slot k % 2 is written again it waits for the engine's answer to bucket k - 2. So two buckets at most
are on their way, in a socket or in the engine's own file. Sending waits until the socket has taken everything: a slow
link slows the ranks, and fills no memory. Imports no vLLM.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence

import numpy as np
import torch

from megatron_dgrpo.rollout.buckets import piece_shape, rows_of
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.messages import TensorSpec


def num_bytes_of(spec: TensorSpec, start: int, stop: int) -> int:
    """Of rows of a tensor."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return math.prod(piece_shape(spec.shape, start, stop)) * dtype.itemsize


class WireReceiver:
    """A `transports.Receiver`."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._specs: dict[str, TensorSpec] = {}
        self._file = np.zeros(0, np.uint8)

    def begin_update(
        self, version: int, tensors: Sequence[TensorSpec], path: str, num_bytes: int, *, deadline_s: float
    ) -> None:
        self._specs = {spec.name: spec for spec in tensors}
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            self._file = np.frombuffer(mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(descriptor)
        self._client.begin_update(version, tensors, "", num_bytes, source="wire", deadline_s=deadline_s)

    def load_bucket(
        self,
        names: Sequence[str],
        offsets: Sequence[int],
        checksums: Sequence[int] = (),
        rows: Sequence[tuple[int, int]] = (),
        *,
        deadline_s: float,
    ) -> int:
        specs = [self._specs[name] for name in names]
        rows = rows or [(0, rows_of(spec.shape)) for spec in specs]
        sizes = [num_bytes_of(spec, *span) for spec, span in zip(specs, rows, strict=True)]
        start, stop = min(offsets), max(o + size for o, size in zip(offsets, sizes, strict=True))
        data = self._file[start:stop]
        return self._client.load_bucket(names, offsets, checksums, rows, data=data, deadline_s=deadline_s)

    def bucket_loaded(self, call: int, *, deadline_s: float) -> None:
        self._client.bucket_loaded(call, deadline_s=deadline_s)

    def finish_update(self, version: int, *, deadline_s: float) -> None:
        self._file = np.zeros(0, np.uint8)
        self._client.finish_update(version, deadline_s=deadline_s)

    def abandon_update(self, *, deadline_s: float) -> None:
        self._file = np.zeros(0, np.uint8)
        self._client.abandon_update(deadline_s=deadline_s)

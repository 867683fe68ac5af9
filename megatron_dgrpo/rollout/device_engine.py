"""vLLM's end of transfers between GPUs: the shared-memory engine, whose buckets may lie in GPU memory as well.

The manifest's judgement, the places, the rows' order, checksums and refusals are those of `shm_engine`; only where the
bytes of the two buckets are differs by the update's source:

    file   a mapped file: the trainer's, or the host's own that it fills from the connection
    ipc    the trainer's staging memory on this very GPU, mapped; it is read in place
    nccl   memory of this GPU; a bucket is broadcast into its slot before it is read

vLLM waits for the GPU after each bucket, so the answer to a bucket means that it has been read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout import cuda
from megatron_dgrpo.rollout.shm_engine import (
    SharedMemoryInit,
    SharedMemoryUpdate,
    SharedMemoryWeightTransferEngine,
)


@dataclass
class DeviceUpdate(SharedMemoryUpdate):
    join: str = ""
    """JSON: the group of NCCL to become a member of; nothing is loaded."""


class DeviceWeightTransferEngine(SharedMemoryWeightTransferEngine):
    update_info_cls = DeviceUpdate

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._staging: torch.Tensor | None = None
        self._slot_bytes = 0  # where buckets are broadcast
        self._group: cuda.Group | None = None

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        if isinstance(update_info, DeviceUpdate) and update_info.join:
            how = json.loads(update_info.join)
            rank = int(how["first_rank"]) + self.parallel_config.rank
            self._group = cuda.join_group(str(how["key"]), rank, int(how["size"]), self.device)
            return
        super().receive_weights(update_info)

    def _map(self, init_info: SharedMemoryInit) -> None:
        if init_info.source == "ipc":
            handles = json.loads(init_info.path)
            own = cuda.uuid_of(self.device)
            if own not in handles:
                raise TransferError(
                    f"The engine is on GPU {own}, where no rank of the trainer is ({', '.join(handles)}): colocated "
                    "engines run on the trainer's GPUs"
                )
            self._staging = cuda.import_handle(handles[own], self.device)
        elif init_info.source == "nccl":
            self._slot_bytes = int(json.loads(init_info.path)["slot_bytes"])
            self._staging = torch.empty(init_info.num_bytes, dtype=torch.uint8, device=self.device)
        else:
            super()._map(init_info)

    def _buckets(self, update_info: SharedMemoryUpdate) -> torch.Tensor:
        if self._staging is None:
            return super()._buckets(update_info)
        if self._slot_bytes:
            if self._group is None:
                raise TransferError("A bucket was announced before the group that it travels in was joined")
            slot = update_info.offsets[0] // self._slot_bytes
            self._group.broadcast(self._staging[slot * self._slot_bytes : (slot + 1) * self._slot_bytes], src=0)
        return self._staging

    def _unmap(self) -> None:
        super()._unmap()
        self._staging, self._slot_bytes = None, 0
        if self._group is not None:
            self._group.destroy()
            self._group = None

"""What moves memory of GPUs between processes: handles of mapped memory, and groups of NCCL. Torch's and vLLM's own.

**Handles.** A handle is that of the allocator's block, with the place in it, a counter that keeps the exporter's block
from being used again, and an event. `torch.multiprocessing` pickles all of it; here its numbers and bytes travel as
JSON, and nothing is unpickled. The exporter keeps its tensor until the importers have let go.

**Groups.** A group's key (NCCL's unique id) is made by one member and travels to the others over authenticated
connections: no further port is opened for the meeting, and vLLM's pickled rendezvous is not used. NCCL's own
connections, between GPUs' machines, carry that key and are not encrypted. A group that failed is aborted, not ended.
"""

from __future__ import annotations

import base64
from typing import Protocol

import torch

from megatron_dgrpo.errors import TransferError

Handle = dict[str, str | int | bool]


def uuid_of(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def export_handle(tensor: torch.Tensor) -> Handle:
    """Of a whole, contiguous tensor of bytes on a GPU."""
    from torch.multiprocessing.reductions import reduce_tensor

    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    _, parts = reduce_tensor(tensor)
    (_, size, _, offset, _, _, _, handle, storage_bytes, storage_offset, _, counter, counter_offset, event, sync) = (
        parts
    )
    return {
        "num_bytes": int(size[0]),
        "offset": int(offset),
        "handle": _text(handle),
        "storage_bytes": int(storage_bytes),
        "storage_offset": int(storage_offset),
        "counter": _text(counter),
        "counter_offset": int(counter_offset),
        "event": _text(event),
        "event_sync": bool(sync),
    }


def import_handle(handle: Handle, device: torch.device) -> torch.Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    tensor: torch.Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        torch.Tensor,
        (int(handle["num_bytes"]),),
        (1,),
        int(handle["offset"]),
        torch.UntypedStorage,
        torch.uint8,
        device.index,  # the same GPU may have another number in the other process
        _bytes(handle["handle"]),
        int(handle["storage_bytes"]),
        int(handle["storage_offset"]),
        False,
        _bytes(handle["counter"]),
        int(handle["counter_offset"]),
        _bytes(handle["event"]),
        bool(handle["event_sync"]),
    )
    return tensor


def collect_handles() -> None:
    """Free exported memory whose importers have let go."""
    torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


class Group(Protocol):
    def broadcast(self, tensor: torch.Tensor, src: int) -> None: ...

    def destroy(self) -> None: ...


def new_group_key() -> str:
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()


def join_group(key: str, rank: int, size: int, device: torch.device) -> Group:
    """All members have to do this at once."""
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    group = uid_init_process_group(base64.b64decode(key), rank, size, device)
    if group.disabled:
        raise TransferError("vLLM has NCCL turned off (VLLM_DISABLE_PYNCCL): leave that out of the environment")
    return group


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str | int | bool) -> bytes:
    return base64.b64decode(str(text))

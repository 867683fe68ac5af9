"""Small collectives that are not of tensors' mathematics."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from megatron_dgrpo.parallel import platform


def broadcast_figures(figures: dict[str, float] | None, *, group: dist.ProcessGroup, source: int) -> dict[str, float]:
    """Named numbers of one rank of a group on all of it; the others need not know the names."""
    if group.size() == 1:
        assert figures is not None
        return figures
    where = platform.device()
    content = json.dumps(figures).encode() if dist.get_rank(group) == source else b""
    length = torch.tensor([len(content)], device=where)
    dist.broadcast(length, group_src=source, group=group)
    text = torch.zeros(int(length), dtype=torch.uint8, device=where)
    if content:
        text.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(text, group_src=source, group=group)
    received: dict[str, float] = json.loads(bytes(text.cpu().tolist()))
    return received

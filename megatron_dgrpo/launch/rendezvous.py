"""How ranks on one node find each other, without a port that another process could take first.

Rank 0 binds a socket to a free port of the loopback interface and hands the *bound* socket to torch's TCPStore, then
publishes the port in a file of the run's private folder (written aside and renamed, so that nobody reads half of it).
Choosing a free port beforehand and binding it later is a race that parallel test runs lose; and a TCPStore left to bind
for itself listens on every interface.

Runs inside ranks: torch is imported where it is used, since `launch` is imported by processes without it.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_dgrpo.errors import LaunchError


def meet(folder: Path, rank: int, world_size: int, timeout_s: float) -> Any:
    """A torch.distributed.TCPStore that all ranks share, hosted by rank 0."""
    from torch.distributed import TCPStore

    file, timeout = Path(folder) / "store_port", datetime.timedelta(seconds=timeout_s)
    if rank == 0:
        listener = socket.create_server(("127.0.0.1", 0), backlog=max(128, world_size))
        port = listener.getsockname()[1]
        store = TCPStore(
            "127.0.0.1",
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        aside = file.with_suffix(".new")
        aside.write_text(str(port))
        os.replace(aside, file)
        return store
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() > deadline:
            raise LaunchError(f"Rank {rank} waited {timeout_s:g} s for rank 0 to open its store; see rank 0's log.")
        time.sleep(0.005)
    return TCPStore(
        "127.0.0.1", int(file.read_text()), world_size, is_master=False, timeout=timeout, wait_for_workers=False
    )


def join_world(backend: str, timeout_s: float) -> Any:
    """In a rank that the supervisor started: join the others. Returns the store that all ranks share."""
    return init_process_group(
        Path(os.environ["DGRPO_RENDEZVOUS"]),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        backend=backend,
        timeout_s=timeout_s,
    )


def init_process_group(folder: Path, *, rank: int, world_size: int, backend: str, timeout_s: float) -> Any:
    """torch.distributed's default group over `meet`'s store, which is returned; `timeout_s` is that of collectives."""
    import torch.distributed as dist

    store = meet(folder, rank, world_size, timeout_s)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return store

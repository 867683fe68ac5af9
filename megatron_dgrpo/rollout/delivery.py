"""One version of the weights to all replicas of an engine, each by the transport that was chosen for it.

Replicas that read the ranks' shared file, or are sent it, are served by one push; those on GPUs by one push for each
kind. Every rank takes part in every push: rank 0 says which there are. Colocated engines, which sleep while the student
trains, are woken before: weights first, keys and values when the weights are whole. Imports no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed import Store

from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.rollout import cuda
from megatron_dgrpo.rollout.board import Board
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.compatibility import this_side
from megatron_dgrpo.rollout.device_push import push_on_device
from megatron_dgrpo.rollout.pool import Replica
from megatron_dgrpo.rollout.transfer import push_weights
from megatron_dgrpo.rollout.transports import ON_DEVICE, Receiver, Side
from megatron_dgrpo.rollout.wire_receiver import WireReceiver

_FILE = "file"
_GPU = "weights/gpu/{}"


def deliver(
    shards: Callable[[], Iterable[WeightShard]],
    manifest: Sequence[WeightSpec],
    *,
    version: int,
    store: Store,
    group: dist.ProcessGroup,
    device: torch.device,
    targets: Sequence[Replica] = (),
    bucket_bytes: int,
    shm_prefix: str,
    deadline_s: float,
    checksums: bool = False,
) -> None:
    """Called by every rank of `group`; `targets` are rank 0's, connected. `shards` is called once for each push."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    by_push: dict[str, list[Replica]] = {}
    for replica in targets:
        by_push.setdefault(replica.transport if replica.transport in ON_DEVICE else _FILE, []).append(replica)
    _wake(targets, "weights", deadline_s)
    for push in _pushes(list(by_push), store, rank, num_ranks, device, deadline_s):
        members = [(r, r.client) for r in by_push.get(push, []) if r.client is not None]
        if push == _FILE:
            push_weights(
                shards(),
                manifest,
                version=version,
                store=store,
                rank=rank,
                num_ranks=num_ranks,
                clients=[_receiver(replica, client) for replica, client in members],
                bucket_bytes=bucket_bytes,
                shm_prefix=shm_prefix,
                deadline_s=deadline_s,
                checksums=checksums,
            )
            continue
        push_on_device(
            shards(),
            manifest,
            source=push,
            version=version,
            store=store,
            group=group,
            device=device,
            clients=[client for _, client in members],
            engine_ranks=[len(r.info.gpus) for r, _ in members if r.info is not None],
            bucket_bytes=bucket_bytes,
            deadline_s=deadline_s,
            checksums=checksums,
        )
    _wake(targets, "kv_cache", deadline_s)


def tell_gpu(store: Store, rank: int, device: torch.device) -> None:
    """Every rank of the trainer says which GPU it has."""
    if device.type == "cuda":
        store.set(_GPU.format(rank), cuda.uuid_of(device))


def trainer_side(store: Store, ranks: Iterable[int], device: torch.device) -> Side:
    if device.type == "cpu":
        return this_side("cpu", ())
    return this_side(device.type, tuple(store.get(_GPU.format(rank)).decode() for rank in ranks))


def _receiver(replica: Replica, client: EngineClient) -> Receiver:
    return WireReceiver(client) if replica.transport == "wire" else client


def _wake(targets: Sequence[Replica], what: str, deadline_s: float) -> None:
    """Those that sleep while the student trains."""
    for replica in targets:
        if replica.info is not None and replica.info.can_sleep and replica.client is not None:
            replica.client.wake(what, deadline_s=deadline_s)


def _pushes(
    mine: list[str], store: Store, rank: int, num_ranks: int, device: torch.device, deadline_s: float
) -> list[str]:
    """Rank 0's list, on every rank."""
    if device.type == "cpu":
        return [_FILE]  # `transports.choose` has seen to it
    board = Board(store, "pushes", rank=rank, num_ranks=num_ranks, deadline_s=deadline_s)
    try:
        if rank == 0:
            board.publish("kinds", json.dumps(mine).encode())
        kinds: list[str] = json.loads(board.await_key("kinds", "rank 0 to know its engines"))
        return kinds
    finally:
        board.leave(["kinds"])

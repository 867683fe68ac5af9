"""From a sharded trainer to engines on GPUs, through GPU memory. Imports vLLM only where a group of NCCL is opened.

The plan, the slots, the coverage and the questions to the store are those of `transfer`; the difference is where ranks
write. Each rank has a staging tensor of two slots on its own device. What happens before what, for bucket k:

    all ranks   wait until the engines have read bucket k - 2; clear slot k % 2, write their boxes into it -> `wrote`
    rank 0      checks that the boxes of all cover the bucket exactly                                      -> `go`
    all ranks   add up the slot's bytes over the ranks: every byte is written by one of them and zero on the others,
                so the sum has all bytes of the bucket, exactly; wait for the device                       -> `summed`
    rank 0      `ipc`: when all have, tells the engines, whose ranks read the staging tensor of their own GPU
                `nccl`: tells the engines, broadcasts its slot to them, and waits for their answers: an engine that
                refuses takes no part in the broadcast, and only its answer ends a wait for the device

So a rank has one bucket whole at a time, and never more. Nobody enters the sum before all have written (`go`): one that
failed ends the others in the store, not in a collective. NCCL's group is made for one update and aborted with it,
since its members change whenever an engine is started again. An engine that dies in the middle of a broadcast leaves
the others inside it; those that do not come back when the group is aborted are found by `hang_timeout_s`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed import Store

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import DGRPOError, TransferError
from megatron_dgrpo.rollout import cuda
from megatron_dgrpo.rollout.board import Board
from megatron_dgrpo.rollout.boxes import ShardReader
from megatron_dgrpo.rollout.buckets import NUM_SLOTS, Bucket, plan_buckets
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.links import Links
from megatron_dgrpo.rollout.messages import TensorSpec
from megatron_dgrpo.rollout.transfer import Wrote, _Push


class SourcedClient:
    """A `transports.Receiver` whose buckets lie where `source` says."""

    def __init__(self, client: EngineClient, source: str) -> None:
        self._client, self._source = client, source
        self.load_bucket, self.bucket_loaded = client.load_bucket, client.bucket_loaded
        self.finish_update, self.abandon_update = client.finish_update, client.abandon_update

    def begin_update(
        self, version: int, tensors: Sequence[TensorSpec], path: str, num_bytes: int, *, deadline_s: float
    ) -> None:
        self._client.begin_update(version, tensors, path, num_bytes, source=self._source, deadline_s=deadline_s)


def push_on_device(
    shards: Iterable[WeightShard],
    manifest: Sequence[WeightSpec],
    *,
    source: str,
    version: int,
    store: Store,
    group: dist.ProcessGroup,
    device: torch.device,
    clients: Sequence[EngineClient] = (),
    engine_ranks: Sequence[int] = (),
    bucket_bytes: int,
    deadline_s: float,
    checksums: bool = False,
) -> None:
    """`push_weights` by `ipc` or `nccl`. `group` has the ranks that take part; `engine_ranks` are the numbers of ranks
    of each client's engine."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    board = Board(store, "push_on_device", rank=rank, num_ranks=num_ranks, deadline_s=deadline_s)
    push = None
    try:
        push = _DevicePush(plan_buckets(manifest, bucket_bytes), manifest, board, Links(board), clients, checksums)
        push.open(source, version, group, device, clients, engine_ranks)
        push.move(ShardReader(shards, manifest))
        push.finish(version)
    except BaseException as error:
        board.fail(f"rank {rank}: {error or type(error).__name__}")
        if push is not None:
            push.close()  # an engine that waits in NCCL cannot answer
        for client in clients:
            with contextlib.suppress(DGRPOError):
                client.abandon_update(deadline_s=5.0)
        raise
    finally:
        if push is not None:
            push.close()
        by_rank = [
            f"{what}/{r}" for r in range(num_ranks) for what in ("handle", *_by_slot("wrote"), *_by_slot("summed"))
        ]
        board.leave(["begun", "read", "done", *_by_slot("go"), *by_rank])


def _by_slot(what: str) -> Iterator[str]:
    return (f"{what}{slot}" for slot in range(NUM_SLOTS))


class _DevicePush(_Push):
    def open(
        self,
        source: str,
        version: int,
        ranks: dist.ProcessGroup,
        device: torch.device,
        clients: Sequence[EngineClient],
        engine_ranks: Sequence[int],
    ) -> None:
        """Take staging memory, have the engines judge the manifest, and open the way to them."""
        self.source, self.ranks, self.device = source, ranks, device
        self.group: cuda.Group | None = None
        self.file = torch.zeros(self.plan.file_bytes, dtype=torch.uint8, device=device)
        self.clients = [SourcedClient(client, source) for client in clients]
        if source == "ipc":
            handles = self._handles()
            self.path = json.dumps(handles)
        else:
            self.path = json.dumps({"slot_bytes": self.plan.slot_bytes})
        if self.board.rank == 0:
            self._offer(version)
            if source == "nccl":
                self._join(clients, engine_ranks)
            self.board.publish("begun", str(version).encode())
        elif (begun := int(self.board.await_key("begun", "the engines to judge the manifest"))) != version:
            raise TransferError(f"it was told to push version {version}, and rank 0 version {begun}")

    def close(self) -> None:
        """Let go of the group and of the staging memory; safe to call again."""
        group, self.group = getattr(self, "group", None), None
        if group is not None:
            group.destroy()
        self.file = torch.empty(0, dtype=torch.uint8)
        self.path = ""
        if getattr(self, "source", "") == "ipc":
            cuda.collect_handles()

    def _handles(self) -> dict[str, cuda.Handle]:
        """Every rank's staging memory by its GPU, on rank 0."""
        own = [0, cuda.uuid_of(self.device), cuda.export_handle(self.file)]
        self.board.publish(f"handle/{self.board.rank}", json.dumps(own).encode())
        if self.board.rank:
            return {}
        keys = [f"handle/{rank}" for rank in range(self.board.num_ranks)]
        return {str(uuid): handle for uuid, handle in self.board.await_turn(keys, 0, "all ranks to map their memory")}

    def _join(self, clients: Sequence[EngineClient], engine_ranks: Sequence[int]) -> None:
        """All at once, after all engines have taken the manifest: one that is missing would keep the others."""
        key, size, first = cuda.new_group_key(), 1 + sum(engine_ranks), 1
        calls = []
        for client, count in zip(clients, engine_ranks, strict=True):
            how = json.dumps({"key": key, "first_rank": first, "size": size})
            calls.append(client.join_update(how, deadline_s=self.board.left()))
            first += count
        joined: list[cuda.Group | BaseException] = []

        def join() -> None:
            try:
                joined.append(cuda.join_group(key, 0, size, self.device))
            except BaseException as error:
                joined.append(error)

        thread = threading.Thread(target=join, daemon=True)  # NCCL has no deadline of its own here
        thread.start()
        for client, call in zip(clients, calls, strict=True):
            client.joined(call, deadline_s=self.board.left())
        thread.join(self.board.left())
        if not joined:
            raise TransferError("the deadline passed: rank 0 waited for the group that weights travel in")
        if isinstance(joined[0], BaseException):
            raise TransferError(f"rank 0 could not join the group that weights travel in: {joined[0]}")
        self.group = joined[0]

    # ---- the bytes ----

    def move(self, shards: ShardReader) -> None:
        first = self.board.rank == 0
        for number, bucket in enumerate(self.plan.buckets):
            num_read = number - NUM_SLOTS + 1
            if first:
                self._collect_answers(num_read)
            elif num_read > 0:
                self.board.await_count("read", num_read, f"the engines to read bucket {num_read - 1}")
            slot = self.file[bucket.slot * self.plan.slot_bytes : (bucket.slot + 1) * self.plan.slot_bytes]
            slot.zero_()
            wrote = self._write(bucket, shards)
            sums = self._agree(number, bucket, wrote)
            points.reached("device.sum")
            dist.all_reduce(slot, group=self.ranks)
            self._wait_for_device()
            self._hand_over(number, bucket, slot, sums)
        shards.expect_end()
        if first:
            self._collect_answers(len(self.plan.buckets))

    def _others(self, number: int, bucket: Bucket) -> list[Wrote]:
        """By the store: the ranks may be on several machines."""
        keys = [f"wrote{bucket.slot}/{rank}" for rank in range(1, self.board.num_ranks)]
        return [(boxes, sums) for boxes, sums in self.board.await_turn(keys, number, f"all ranks to write {number}")]

    def _free(self) -> None:
        if self.board.num_ranks > 1:
            self.board.count("read")

    def finish(self, version: int) -> None:
        if self.board.rank != 0:
            self.board.await_key("done", f"the engines to have version {version}")
            return
        for client in self.clients:
            client.finish_update(version, deadline_s=self.board.left())
        if self.board.num_ranks > 1:
            self.board.publish("done", b"1")

    def _agree(self, number: int, bucket: Bucket, wrote: Wrote) -> list[int]:
        """No rank goes on before all have written a bucket that is whole."""
        if self.board.rank == 0:
            sums = self._whole(number, bucket, wrote)
            self.board.publish(f"go{bucket.slot}", json.dumps([number]).encode())
            return sums
        self.board.publish(f"wrote{bucket.slot}/{self.board.rank}", json.dumps([number, *wrote]).encode())
        self.board.await_turn([f"go{bucket.slot}"], number, f"rank 0 to find bucket {number} whole")
        return []

    def _hand_over(self, number: int, bucket: Bucket, slot: torch.Tensor, sums: list[int]) -> None:
        if self.source == "ipc" and self.board.rank:
            self.board.publish(f"summed{bucket.slot}/{self.board.rank}", json.dumps([number]).encode())
        if self.board.rank:
            return
        if self.source == "ipc":
            keys = [f"summed{bucket.slot}/{rank}" for rank in range(1, self.board.num_ranks)]
            self.board.await_turn(keys, number, f"all ranks to have bucket {number}")
        self._tell(bucket, sums)
        if self.group is not None:
            self.group.broadcast(slot, src=0)
            self._collect_answers(number + 1)

    def _collect_answers(self, num_rounds: int) -> None:
        super()._collect_answers(num_rounds)
        self._wait_for_device()  # what was broadcast has left the slot

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _unlink(self) -> None:
        """There is no file."""

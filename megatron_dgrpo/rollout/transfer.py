"""From a sharded trainer to engines on the same machine, through a file in shared memory. Imports no vLLM.

Every rank writes the boxes that it holds straight to their places; no rank has more of the model than that, and the
file holds two buckets. What happens before what:

    rank 0   creates the file and offers the manifest to the engines           -> `path`, in the store
    ranks    map the file; write bucket k into slot k % 2, once bucket k - 2
             has been read by all engines (freed >= k - 1)                     -> a line to rank 0: the boxes
    rank 0   when all ranks have written bucket k: checks that their boxes
             cover its pieces exactly, tells the engines to load it, and
             goes on to write its own part of bucket k + 1
    rank 0   before it writes bucket k + 2: waits for the engines' answers     -> freed += 1
    rank 0   after the last bucket: tells the engines to finish                -> freed += 1

What is said about each bucket goes through sockets (`links`): as a question to the store it would cost more than the
bucket. Fresh memory costs more than the copy into it: small buckets, whose two slots are used again and again, are
faster than large ones, and the file's pages are mapped all at once.

Waiting has a deadline, and is never done in a collective. A rank that fails says so in the store, which everybody who
waits looks at. The file and the socket lose their names as soon as all sides have them open, so that no way of dying
leaves them behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.distributed import Store

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import DGRPOError, TransferError
from megatron_dgrpo.rollout import fp8
from megatron_dgrpo.rollout.board import Board
from megatron_dgrpo.rollout.boxes import Box, ShardReader, check_coverage
from megatron_dgrpo.rollout.buckets import NUM_SLOTS, Bucket, Piece, Plan, map_shared, piece_shape, plan_buckets
from megatron_dgrpo.rollout.checksum import MODULUS, partial_checksum
from megatron_dgrpo.rollout.links import Links
from megatron_dgrpo.rollout.messages import TensorSpec
from megatron_dgrpo.rollout.transports import Receiver

_SHM = "/dev/shm"
Wrote = tuple[list[tuple[int, Box]], list[int]]
"""What a rank wrote of a bucket: numbers of pieces with boxes, and the checksum of its part of each piece."""


def push_weights(
    shards: Iterable[WeightShard],
    manifest: Sequence[WeightSpec],
    *,
    version: int,
    store: Store,
    rank: int,
    num_ranks: int,
    clients: Sequence[Receiver] = (),
    bucket_bytes: int,
    shm_prefix: str,
    deadline_s: float,
    checksums: bool = False,
) -> None:
    """Replace the weights of the engines by those of `shards`. Called by every rank that takes part; returns on each
    once all engines have the new version.

    `shards` yields what this rank holds, in the manifest's order; `manifest` is the whole model, the same on all ranks.
    `clients` are the engines, on rank 0 only. With `checksums`, every tensor's is computed by those who write it and
    compared by the engines. After an error the engines refuse to generate until a later push
    has succeeded, unless it came before the first byte moved.
    """
    board = Board(store, "push_weights", rank=rank, num_ranks=num_ranks, deadline_s=deadline_s)
    links = Links(board)
    try:
        push = _Push(plan_buckets(manifest, bucket_bytes), manifest, board, links, clients, checksums)
        with push.mapped_file(version, shm_prefix):
            push.move(ShardReader(shards, manifest))
            push.finish(version)
            points.reached("transfer.end")
    except BaseException as error:
        board.fail(f"rank {rank}: {error or type(error).__name__}")
        for client in clients:
            with contextlib.suppress(DGRPOError):  # its connection may be what failed; the host gives up by itself then
                client.abandon_update(deadline_s=5.0)
        raise
    finally:
        links.close()  # after a failure was said: who finds them closed looks for it
        board.leave(["path"])


class _Push:
    def __init__(
        self,
        plan: Plan,
        manifest: Sequence[WeightSpec],
        board: Board,
        links: Links,
        clients: Sequence[Receiver],
        checksums: bool,
    ) -> None:
        self.plan, self.manifest, self.board, self.links = plan, manifest, board, links
        self.clients, self.checksums = clients, checksums
        self.path = ""
        self.file = torch.empty(0, dtype=torch.uint8)
        self.num_loaded_rounds = 0  # of rank 0: buckets whose answers it has
        self.asked: list[list[int]] = []  # of rank 0: for each bucket, the calls to the engines

    # ---- the file ----

    @contextlib.contextmanager
    def mapped_file(self, version: int, prefix: str) -> Iterator[None]:
        try:
            if self.board.rank == 0:
                self.path = os.path.join(_SHM, f"{prefix}weights-{secrets.token_hex(6)}")
                self._create()
                self._offer(version)
                points.reached("transfer.begin")
                if self.board.num_ranks > 1:
                    socket = self.links.open(f"{self.path}.socket")
                    self.board.publish("path", json.dumps([version, self.path, *socket]).encode())
                self.file = self._map()
            else:
                offer = json.loads(self.board.await_key("path", "rank 0 to create the shared file"))
                its_version, self.path, *socket = offer
                if its_version != version:
                    raise TransferError(f"it was told to push version {version}, and rank 0 version {its_version}")
                self.file = self._map()
                self.links.join(*socket)
            yield
        finally:
            self._unlink()

    def _create(self) -> None:
        size = self.plan.file_bytes
        descriptor = points.open_file("transfer.file", self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # without it, a full /dev/shm is a bus error on a write
        except OSError as error:
            raise TransferError(
                f"{_SHM} has no room for the {size} bytes that two buckets of weights need ({error.strerror}): lower "
                "bucket_bytes, or give the machine or the container more shared memory"
            ) from None
        finally:
            os.close(descriptor)

    def _map(self) -> torch.Tensor:
        descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            return torch.frombuffer(map_shared(descriptor, self.plan.file_bytes), dtype=torch.uint8)
        finally:
            os.close(descriptor)

    def _unlink(self) -> None:
        if self.board.rank == 0 and self.path:
            points.remove("transfer.unlink", self.path, missing_ok=True)
            self.path = ""

    def _offer(self, version: int) -> None:
        """Every engine judges the manifest before a byte moves."""
        tensors = [
            TensorSpec(s.hf_name, tuple(s.global_shape), str(s.dtype).removeprefix("torch.")) for s in self.manifest
        ]
        for client in self.clients:
            client.begin_update(version, tensors, self.path, self.plan.file_bytes, deadline_s=self.board.left())

    # ---- the bytes ----

    def move(self, shards: ShardReader) -> None:
        for number, bucket in enumerate(self.plan.buckets):
            num_read = number - NUM_SLOTS + 1
            if self.board.rank == 0:
                self._collect_answers(num_read)
            elif num_read > 0:
                self.links.await_freed(num_read, f"the engines to read bucket {num_read - 1}")
            wrote = self._write(bucket, shards)
            if self.board.rank == 0:
                self._tell(bucket, self._whole(number, bucket, wrote))
            else:
                self.links.send(wrote)
        shards.expect_end()
        if self.board.rank == 0:
            self._collect_answers(len(self.plan.buckets))

    def _write(self, bucket: Bucket, shards: ShardReader) -> Wrote:
        boxes: list[tuple[int, Box]] = []
        sums = [0] * len(bucket.pieces)
        for number, box, shard in shards.parts(bucket.pieces):
            piece, spec = bucket.pieces[number], self.manifest[bucket.pieces[number].index]
            local, place = shard.local_tensor, self.target(piece, spec)
            if box:
                first, (start, stop) = shard.box[0][0], box[0]
                local = local[start - first : stop - first]
                place = place[(slice(start - piece.start, stop - piece.start), *(slice(*b) for b in box[1:]))]
            points.reached("transfer.box")
            if shard.scales is not None:
                local = fp8.encode(local, box, shard.scales)
            place.copy_(local)
            boxes.append((number, box))
            if self.checksums:
                exact = tuple((a, b) for a, b in box)
                sums[number] += partial_checksum(local.to(spec.dtype), exact, spec.global_shape)
        return boxes, [total % MODULUS for total in sums]

    def target(self, piece: Piece, spec: WeightSpec) -> torch.Tensor:
        shape = torch.Size(piece_shape(spec.global_shape, piece.start, piece.stop))
        count = shape.numel() * spec.dtype.itemsize
        return self.file[piece.offset : piece.offset + count].view(spec.dtype).view(shape)

    # ---- rank 0 and the engines ----

    def _others(self, number: int, bucket: Bucket) -> list[Wrote]:
        """What the other ranks wrote of a bucket, once all of them have."""
        return self.links.collect(f"all ranks to write bucket {number}")

    def _free(self) -> None:
        """One more bucket's place may be written again."""
        self.links.free()

    def _whole(self, number: int, bucket: Bucket, own: Wrote) -> list[int]:
        """Wait until all ranks have written a bucket, and check that it is whole; returns the tensors' checksums."""
        others = self._others(number, bucket)
        self._unlink()  # every rank has mapped the file, or it could not have written
        wrote = [own, *others]
        check_coverage(self.manifest, bucket.pieces, [boxes for boxes, _ in wrote])
        return [sum(parts) % MODULUS for parts in zip(*[sums for _, sums in wrote], strict=True)]

    def _tell(self, bucket: Bucket, sums: list[int]) -> None:
        """The engines may load a bucket; nobody waits for them yet."""
        names = [self.manifest[piece.index].hf_name for piece in bucket.pieces]
        offsets = [piece.offset for piece in bucket.pieces]
        rows = [(piece.start, piece.stop) for piece in bucket.pieces]
        left = self.board.left()
        sums = sums if self.checksums else []
        self.asked.append([c.load_bucket(names, offsets, sums, rows, deadline_s=left) for c in self.clients])
        points.reached("transfer.told")

    def _collect_answers(self, num_rounds: int) -> None:
        while self.num_loaded_rounds < num_rounds:
            for client, call in zip(self.clients, self.asked[self.num_loaded_rounds], strict=True):
                client.bucket_loaded(call, deadline_s=self.board.left())
            self.num_loaded_rounds += 1
            self._free()

    def finish(self, version: int) -> None:
        if self.board.rank != 0:
            self.links.await_freed(len(self.plan.buckets) + 1, f"the engines to have version {version}")
            return
        for client in self.clients:
            client.finish_update(version, deadline_s=self.board.left())
        self.links.free()

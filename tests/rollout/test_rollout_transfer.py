"""The trainer's side of weight transfer: plans, boxes, checksums, and ranks that fail."""

import glob
import itertools
import os
import signal
import time

import pytest
import torch
from rollout_support import PREFIX, half_shards, manifest_of

from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout.board import Board
from megatron_dgrpo.rollout.boxes import ShardReader, check_coverage
from megatron_dgrpo.rollout.buckets import Piece, plan_buckets, row_bytes, rows_of
from megatron_dgrpo.rollout.checksum import MODULUS, checksum, partial_checksum
from megatron_dgrpo.rollout.transfer import push_weights
from megatron_dgrpo.testing.distributed import RankError, run_distributed

F32 = torch.float32


def spec(name: str, *shape: int, dtype: torch.dtype = F32) -> WeightSpec:
    return WeightSpec(name, shape, dtype)


# ---- plans ----


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1000, 4096, 10**9])
def test_a_plan_has_every_tensor_once_in_order_without_overlap(bucket_bytes):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 40, (50, 2), generator=generator).tolist()
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float64])
    manifest = [WeightSpec(f"w{i}", tuple(size), next(dtypes)) for i, size in enumerate(sizes)]
    plan = plan_buckets(manifest, bucket_bytes)
    covered = [0] * 50  # rows of each tensor
    order = []
    for number, bucket in enumerate(plan.buckets):
        assert bucket.slot == number % 2 and bucket.pieces
        end = bucket.slot * plan.slot_bytes
        for piece in bucket.pieces:
            assert piece.offset >= end and piece.offset % 64 == 0 and piece.start == covered[piece.index]
            covered[piece.index] = piece.stop
            end = piece.offset + (piece.stop - piece.start) * row_bytes(manifest[piece.index])
            order.append(piece.index)
        assert end - bucket.slot * plan.slot_bytes < max(bucket_bytes, *map(row_bytes, manifest)) + 64
        assert end <= (bucket.slot + 1) * plan.slot_bytes
    assert covered == [spec.global_shape[0] for spec in manifest] and order == sorted(order)
    assert set(order) == set(range(50))
    assert plan.slot_bytes < max(bucket_bytes, *map(row_bytes, manifest)) + 64
    assert plan.file_bytes == plan.slot_bytes * min(2, len(plan.buckets))


def test_scalars_and_tensors_without_elements_have_pieces():
    plan = plan_buckets([spec("s"), spec("e", 0, 3), spec("n", 3, 0), spec("v", 5)], 12)
    pieces = [(p.index, p.start, p.stop) for bucket in plan.buckets for p in bucket.pieces]
    assert pieces == [(0, 0, 1), (1, 0, 0), (2, 0, 3), (3, 0, 3), (3, 3, 5)]


def test_empty_manifests_and_names_that_are_there_twice():
    with pytest.raises(TransferError, match="empty"):
        plan_buckets([], 64)
    with pytest.raises(TransferError, match="- w"):
        plan_buckets([spec("w", 1), spec("v", 1), spec("w", 2)], 64)


# ---- checksums ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_checksum_is_the_sum_of_its_boxes_and_knows_their_places(dtype):
    tensor = (torch.randn(7, 6, 5, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    boxes = [((0, 3), (0, 6), (0, 5)), ((3, 7), (0, 6), (0, 2)), ((3, 7), (0, 2), (2, 5)), ((3, 7), (2, 6), (2, 5))]
    parts = [partial_checksum(tensor[tuple(slice(*b) for b in box)], box, tensor.shape) for box in boxes]
    assert sum(parts) % MODULUS == checksum(tensor)
    swapped = tensor.clone()
    swapped[0], swapped[1] = tensor[1], tensor[0]
    assert checksum(swapped) != checksum(tensor)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[-1, -1, -1] ^= 1
    assert checksum(flipped) != checksum(tensor)


def test_a_checksum_by_hand_and_of_odd_shapes():
    tensor = torch.tensor([[1, -2], [3, 4]], dtype=torch.int32)
    assert checksum(tensor) == (1 * 1 - 2 * 3 + 3 * 5 + 4 * 7) % MODULUS
    assert checksum(torch.tensor(5, dtype=torch.int16)) == 5
    assert checksum(torch.zeros(0, 3)) == 0
    big = torch.arange(3 * (1 << 21), dtype=torch.int32).reshape(3, -1)  # more than one chunk
    index = torch.arange(big.numel(), dtype=torch.int64)
    assert checksum(big) == int((index * (2 * index + 1)).sum()) % MODULUS


# ---- boxes ----


def whole_pieces(manifest, indices=None):
    return [Piece(i, 0, rows_of(manifest[i].global_shape), 0) for i in indices or range(len(manifest))]


def shard(name: str = "w", shape=(4, 6), box=((0, 4), (0, 6)), local=None, dtype=F32) -> WeightShard:
    local = torch.zeros([b - a for a, b in box]) if local is None else local
    return WeightShard(name, shape, dtype, box, local)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ([shard("other")], "other: a shard of it came, and the manifest does not have it"),
        ([shard("x", (2,), ((0, 2),)), shard()], "w: it came after a later tensor"),
        ([shard(shape=(4, 5), box=((0, 4), (0, 5)))], r"w: the shard is of \[4, 5\]"),
        ([shard(dtype=torch.bfloat16)], r"w: the shard is of \[4, 6\] torch.bfloat16, the manifest has"),
        (
            [shard(box=((0, 5), (0, 6)))],
            r"w: a local tensor of \[5, 6\] does not fill the box \[0:5, 0:6\] of \[4, 6\]",
        ),
        ([shard(box=((-1, 2), (0, 6)))], "does not fill"),
        ([shard(box=((0, 4),))], "does not fill"),
        ([shard(local=torch.zeros(6, 4))], "does not fill"),
    ],
)
def test_a_shard_that_does_not_fit_the_manifest(wrong, text):
    reader = ShardReader(wrong, [spec("v", 1), spec("w", 4, 6), spec("x", 2)])
    with pytest.raises(TransferError, match=text):
        list(reader.parts(whole_pieces([spec("v", 1), spec("w", 4, 6), spec("x", 2)])))


def test_shards_are_taken_when_their_bucket_comes():
    taken = []

    def shards():
        for name in ("v", "w", "w", "x"):
            taken.append(name)
            yield shard(name, (1,), ((0, 1),))

    reader = ShardReader(shards(), [spec("v", 1), spec("w", 1), spec("x", 1)])

    def numbers(*indices):
        return [number for number, _, _ in reader.parts([Piece(i, 0, 1, 0) for i in indices])]

    assert numbers(0) == [0] and taken == ["v", "w"]
    assert numbers(1) == [0, 0] and taken == ["v", "w", "w", "x"]
    assert numbers(2) == [0]
    reader.expect_end()


def test_a_shard_is_cut_where_its_tensor_is():
    local = torch.arange(8.0).view(4, 2)
    shards = [shard("w", (6, 4), ((1, 5), (2, 4)), local), shard("x", (2,), ((0, 2),))]
    reader = ShardReader(shards, [spec("w", 6, 4), spec("x", 2)])
    boxes = [
        [(number, box, one.hf_name) for number, box, one in reader.parts(pieces)]
        for pieces in ([Piece(0, 0, 1, 0)], [Piece(0, 1, 3, 0)], [Piece(0, 3, 6, 0), Piece(1, 0, 2, 0)])
    ]
    right = (2, 4)
    assert boxes == [[], [(0, ((1, 3), right), "w")], [(0, ((3, 5), right), "w"), (1, ((0, 2),), "x")]]


def test_gaps_and_overlaps_are_all_named():
    manifest = [spec("a", 4, 4), spec("b", 4), spec("c", 2, 2), spec("d", 3), spec("e")]
    left, right = ((0, 4), (0, 2)), ((0, 4), (2, 4))
    whole = [[(0, left), (4, ())], [(0, right), (1, ((0, 4),)), (2, ((0, 2), (0, 2))), (3, ((0, 3),))]]
    pieces = whole_pieces(manifest)
    check_coverage(manifest, pieces, whole)
    with pytest.raises(TransferError) as caught:
        check_coverage(
            manifest, pieces, [[(0, left), (1, ((0, 3),)), (4, ())], [(0, ((0, 4), (1, 3))), (3, ((0, 3),))]]
        )
    assert str(caught.value).splitlines()[1:] == [
        "  - a: rank 0's [0:4, 0:2] and rank 1's [0:4, 1:3] overlap",
        "  - b: 1 of its 4 elements were written by no rank",
        "  - c: 4 of its 4 elements were written by no rank",
    ]
    with pytest.raises(TransferError, match=r"e: rank 0's \[\] and rank 1's \[\] overlap"):
        check_coverage(manifest, whole_pieces(manifest, [4]), [[(0, ())], [(0, ())]])
    with pytest.raises(TransferError, match=r"b: 1 of its 2 elements in rows 1 to 3 were written by no rank"):
        check_coverage(manifest, [Piece(1, 1, 3, 0)], [[(0, ((1, 2),))]])


# ---- ranks ----


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"w{i:02}": torch.randn(16, 8, generator=generator) for i in range(12)}


def push(rank, world_size, fault, num_pushes=1):
    """Push with a fault on rank 1; returns what each rank saw, how long it took, and the keys left in the store."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    keys, start, seen = store.num_keys(), time.monotonic(), []

    def shards():
        for index, one in enumerate(half_shards(tensors(), rank, world_size)):
            if rank == 1 and index == 7 and fault == "raise":
                raise ValueError("the exporter broke")
            if rank == 1 and index == 7 and fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1 and index == 7 and fault == "gap":
                continue
            if rank == 1 and index == 7 and fault == "hang":
                time.sleep(6)
            yield one

    for version in range(1, num_pushes + 1):
        try:
            push_weights(
                shards(),
                manifest_of(tensors()),
                version=version,
                store=store,
                rank=rank,
                num_ranks=world_size,
                bucket_bytes=1200,
                shm_prefix=PREFIX,
                deadline_s=3.0 if fault in ("kill", "hang") else 30.0,
                checksums=True,
            )
            seen.append("")
        except (TransferError, ValueError) as error:
            seen.append(str(error))
    elapsed = time.monotonic() - start
    dist.barrier() if fault in ("", "raise", "gap") else None
    return seen, elapsed, store.num_keys() - keys


def leftovers():
    return glob.glob(f"/dev/shm/{PREFIX}*")


@pytest.mark.parametrize("world_size", [1, 3])
def test_pushes_leave_nothing_behind(world_size):
    results = run_distributed(push, world_size, "", 3)
    assert [seen for seen, _, _ in results] == [["", "", ""]] * world_size
    assert max(keys for _, _, keys in results) <= 2 + 3 * world_size  # the barrier's own, and each rank's turns
    assert leftovers() == []


def test_a_rank_that_fails_ends_the_others_with_its_words():
    results = run_distributed(push, 3, "raise")
    assert results[1][0] == ["the exporter broke"]
    for rank in (0, 2):
        (text,) = results[rank][0]
        assert text.startswith("rank 1: the exporter broke") and f"(rank {rank} waited for" in text
    assert max(elapsed for _, elapsed, _ in results) < 20
    assert leftovers() == []


def test_a_gap_is_named_before_its_bucket_is_loaded():
    for (text,), elapsed, _ in run_distributed(push, 2, "gap"):
        assert "w07: 64 of its 128 elements were written by no rank" in text and elapsed < 20
    assert leftovers() == []


def test_a_rank_that_hangs_is_found_by_the_deadline():
    results = run_distributed(push, 3, "hang")
    for rank in (0, 2):
        (text,), elapsed, _ = results[rank]
        assert "the deadline passed" in text and 2.5 < elapsed < 20
    assert leftovers() == []


def test_a_killed_rank_is_found_and_no_file_is_left():
    with pytest.raises(RankError, match="SIGKILL"):
        run_distributed(push, 3, "kill")
    assert leftovers() == []


def test_no_room_in_shared_memory_is_an_error_and_not_a_crash(tmp_path):
    free = os.statvfs("/dev/shm")
    too_much = free.f_bavail * free.f_frsize + 2**30
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    with pytest.raises(TransferError, match="/dev/shm has no room .*lower bucket_bytes"):
        push_weights(
            [],
            [spec("w", too_much // 4)],
            version=1,
            store=store,
            rank=0,
            num_ranks=1,
            bucket_bytes=too_much,
            shm_prefix=PREFIX,
            deadline_s=60,
        )
    assert leftovers() == []


def use_topic(rank, world_size, turns):
    """Ranks fail and leave in turn, before the others have come or after."""
    import torch.distributed as dist

    store, seen = dist.distributed_c10d._get_default_store(), []
    for turn in range(turns):
        board = Board(store, "topic", rank=rank, num_ranks=world_size, deadline_s=60)
        try:
            if turn % 4 == rank:
                raise TransferError(f"failure {turn}")
            board.count("here")
            board.await_count("here", world_size, "the others")
            seen.append(turn)
        except TransferError as error:
            board.fail(str(error))
            seen.append(str(error).partition(" (")[0])
        finally:
            board.leave(["here"])
    dist.barrier()
    return seen, [
        key for turn in range(turns) for key in ("here", "left", "failure") if store.check([f"topic/{turn + 1}/{key}"])
    ]


def test_a_topic_can_be_used_again_whoever_failed_and_left_early():
    expected = [f"failure {turn}" if turn % 4 < 3 else turn for turn in range(60)]
    assert run_distributed(use_topic, 3, 60) == [(expected, [])] * 3


def push_different_versions(rank, world_size):
    import torch.distributed as dist

    try:
        push_weights(
            half_shards(tensors(), rank, world_size),
            manifest_of(tensors()),
            version=5 + rank,
            store=dist.distributed_c10d._get_default_store(),
            rank=rank,
            num_ranks=world_size,
            bucket_bytes=1200,
            shm_prefix=PREFIX,
            deadline_s=60,
        )
    except TransferError as error:
        return str(error)
    finally:
        dist.barrier()


def test_ranks_that_push_different_versions_find_out():
    errors = run_distributed(push_different_versions, 2)
    assert errors[1] == "it was told to push version 6, and rank 0 version 5"
    assert errors[0].startswith(f"rank 1: {errors[1]}")
    assert leftovers() == []

"""Weights for engines that see no memory of the trainer's: over TCP, into a file of their own."""

from __future__ import annotations

import glob
import os
import re
import signal
import time

import numpy as np
import pytest
from rollout_support import (
    PREFIX,
    difference,
    engine_host,
    free_port,
    fresh,
    greedy,
    half_shards,
    manifest_of,
    whole_tensors,
)

from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.inbox import Inbox
from megatron_dgrpo.rollout.messages import BeginUpdate, LoadBucket, TensorSpec, WeightBytes
from megatron_dgrpo.rollout.wire_receiver import WireReceiver
from megatron_dgrpo.testing.distributed import RankError, run_distributed

TOLERANCE = 1e-4


class DiesAt(WireReceiver):
    """Its process is killed when so many parts of buckets have gone."""

    def __init__(self, client: EngineClient, parts: int) -> None:
        super().__init__(client)
        send, sent = client._send, [0]

        def send_until(message, *more):  # type: ignore[no-untyped-def]
            send(message, *more)
            sent[0] += isinstance(message, WeightBytes)
            if sent[0] == parts:
                os.kill(os.getpid(), signal.SIGKILL)

        client._send = send_until  # type: ignore[method-assign]


def push_over_the_wire(rank, world_size, folder, address, key, version, leave_out=(), dies_at=0):
    import torch.distributed as dist

    from megatron_dgrpo.rollout import client as client_module
    from megatron_dgrpo.rollout.transfer import push_weights

    client_module._PART_BYTES = 10_000  # several parts to a bucket
    tensors = whole_tensors(folder)
    clients = [EngineClient.connect(address, key, deadline_s=60, owner=False)] if rank == 0 else []
    receivers = [DiesAt(c, dies_at) if dies_at else WireReceiver(c) for c in clients]
    try:
        push_weights(
            half_shards(tensors, rank, world_size, leave_out),
            manifest_of(tensors),
            version=version,
            store=dist.distributed_c10d._get_default_store(),
            rank=rank,
            num_ranks=world_size,
            clients=receivers,
            bucket_bytes=40_000,
            shm_prefix=PREFIX,
            deadline_s=60,
            checksums=True,
        )
    except TransferError as error:
        return str(error)
    finally:
        for client in clients:
            client.close()
    return ""


def _mapped_bytes(pid: int) -> int:
    """Of inboxes, in a process."""
    spans = re.findall(r"^(\w+)-(\w+) .*dgrpo-inbox", open(f"/proc/{pid}/maps").read(), re.M)
    return sum(int(b, 16) - int(a, 16) for a, b in spans)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_without_the_trainers_memory_is_like_a_fresh_one(untied_folders, tp):
    address = f"tcp:127.0.0.1:{free_port()}"
    with engine_host(untied_folders[0], address=address, tp=tp) as host:
        before = host.answers(greedy())
        for version in (1, 2):
            assert run_distributed(push_over_the_wire, 2, untied_folders[version], address, host.key, version) == [
                "",
                "",
            ]
            answers = host.answers(greedy())
            assert difference(answers, fresh(untied_folders[version], greedy())) <= TOLERANCE
            assert difference(answers, before) > 100 * TOLERANCE
            assert host.client.describe().weight_version == version
            before = answers
        assert not glob.glob(f"/dev/shm/{PREFIX}*")


def test_a_trainer_killed_within_a_bucket_leaves_the_engine_refusing(untied_folders):
    address = f"tcp:127.0.0.1:{free_port()}"
    with engine_host(untied_folders[0], address=address) as host:
        with pytest.raises(RankError):
            run_distributed(push_over_the_wire, 2, untied_folders[1], address, host.key, 1, (), 6)
        deadline = time.monotonic() + 60
        while (info := host.client.describe()).whole and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not info.whole and info.weight_version == 0
        with pytest.raises(RolloutError, match="not whole"):
            host.answers(greedy())
        errors = run_distributed(push_over_the_wire, 2, untied_folders[1], address, host.key, 1, ("model.norm.weight",))
        assert all("model.norm.weight: 64 of its 64 elements were written by no rank" in error for error in errors)
        with pytest.raises(RolloutError, match="not whole"):
            host.answers(greedy())
        assert run_distributed(push_over_the_wire, 2, untied_folders[2], address, host.key, 2) == ["", ""]
        assert difference(host.answers(greedy()), fresh(untied_folders[2], greedy())) <= TOLERANCE
        assert _mapped_bytes(host.child.pid) == 0


# ---- the engine's file ----

SPECS = (TensorSpec("v", (4,), "float32"), TensorSpec("w", (3, 4), "float32"))


def inbox() -> Inbox:
    found = Inbox(BeginUpdate(1, 1, SPECS, "", 256, "wire"))
    assert os.stat(found.path).st_size == 256
    found.close()
    return found


def test_an_inbox_takes_parts_in_order_and_knows_what_has_come():
    box = inbox()
    assert not os.path.exists(box.path)
    bucket = LoadBucket(7, ("v", "w"), (0, 64), (), (0, 1), (4, 3))  # v whole, rows 1 and 2 of w: bytes 64 to 96
    box.put(WeightBytes(7, 0, np.arange(64, dtype=np.uint8)))
    with pytest.raises(TransferError, match="w: its bytes 64 to 96 have not come"):
        box.check(bucket)
    box.put(WeightBytes(7, 64, np.arange(32, dtype=np.uint8)))
    box.check(bucket)
    assert bytes(box._file[60:70]) == bytes([60, 61, 62, 63, 0, 1, 2, 3, 4, 5])
    with pytest.raises(TransferError, match="v: its bytes 0 to 16 have not come"):
        box.check(LoadBucket(8, ("v",), (0,), ()))  # those were of another bucket


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (WeightBytes(1, 250, np.zeros(7, np.uint8)), "Bytes 250 to 257"),
        (WeightBytes(1, -1, np.zeros(7, np.uint8)), "Bytes -1 to 6"),
        (WeightBytes(1, 0, np.zeros(7, np.int32)), "Bytes 0 to 7"),
    ],
)
def test_bytes_outside_of_an_inbox(message, words):
    with pytest.raises(TransferError, match=words):
        inbox().put(message)


def test_a_gap_between_parts():
    box = inbox()
    box.put(WeightBytes(1, 0, np.zeros(8, np.uint8)))
    with pytest.raises(TransferError, match="not where they were left"):
        box.put(WeightBytes(1, 9, np.zeros(8, np.uint8)))

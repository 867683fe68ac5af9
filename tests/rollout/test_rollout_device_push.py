"""Transfers through staging memory, on CPU: the plan, the sums, the group and the refusals are those of GPUs. Handles
of mapped memory and NCCL groups, which a CPU has not, are files and gloo here (tests/gpu has the real ones)."""

from __future__ import annotations

import mmap
import os
import tempfile

import pytest
from rollout_support import difference, engine_host, fresh, greedy, half_shards, manifest_of, whole_tensors

from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.points.plan import Fault
from megatron_dgrpo.testing.distributed import RankError, run_distributed
from megatron_dgrpo.testing.faults import plan

TOLERANCE = 1e-4


def without_cuda() -> None:
    """In place of `rollout.cuda`: shared files in place of GPU memory, gloo in place of NCCL."""
    import torch
    import torch.distributed as dist

    from megatron_dgrpo.rollout import cuda

    class Group:
        def __init__(self, key, rank, size):  # type: ignore[no-untyped-def]
            self._group = dist.ProcessGroupGloo(dist.FileStore(key, size), rank, size)

        def broadcast(self, tensor, src):  # type: ignore[no-untyped-def]
            options = dist.BroadcastOptions()
            options.rootRank = src
            self._group.broadcast([tensor], options).wait()

        def destroy(self):  # type: ignore[no-untyped-def]
            self._group = None

    def export_handle(tensor):  # type: ignore[no-untyped-def]
        descriptor, size = tensor.untyped_storage()._share_fd_cpu_()
        return {"path": f"/proc/{os.getpid()}/fd/{os.dup(descriptor)}", "num_bytes": size}

    def import_handle(handle, device):  # type: ignore[no-untyped-def]
        with open(handle["path"], "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), handle["num_bytes"]), dtype=torch.uint8)

    cuda.uuid_of = lambda device: "cpu"
    cuda.export_handle, cuda.import_handle, cuda.collect_handles = export_handle, import_handle, lambda: None
    cuda.new_group_key = lambda: tempfile.mktemp(prefix="dgrpo-group-")
    cuda.join_group = lambda key, rank, size, device: Group(key, rank, size)


def serve_without_cuda(**settings: object) -> None:
    without_cuda()
    from megatron_dgrpo.rollout.host import serve

    serve(**settings)  # type: ignore[arg-type]


def push(rank, world_size, folder, address, key, version, source, leave_out=(), break_bytes=False):
    import torch
    import torch.distributed as dist

    from megatron_dgrpo.rollout.client import EngineClient
    from megatron_dgrpo.rollout.device_push import _DevicePush, push_on_device

    without_cuda()
    if break_bytes:
        hand_over = _DevicePush._hand_over

        def broken(self, number, bucket, slot, sums):  # type: ignore[no-untyped-def]
            slot[0] ^= 1
            hand_over(self, number, bucket, slot, sums)

        _DevicePush._hand_over = broken
    tensors = whole_tensors(folder)
    clients = [EngineClient.connect(address, key, deadline_s=60, owner=False)] if rank == 0 else []
    try:
        push_on_device(
            half_shards(tensors, rank, world_size, leave_out),
            manifest_of(tensors),
            source=source,
            version=version,
            store=dist.distributed_c10d._get_default_store(),
            group=dist.group.WORLD,
            device=torch.device("cpu"),
            clients=clients,
            engine_ranks=[1] * len(clients),
            bucket_bytes=40_000,
            deadline_s=60,
            checksums=True,
        )
    except TransferError as error:
        return str(error)
    finally:
        for client in clients:
            client.close()
    return ""


def test_an_engine_that_reads_staging_memory_is_like_a_fresh_one(untied_folders, tmp_path):
    with engine_host(untied_folders[0], target="test_rollout_device_push:serve_without_cuda") as host:
        before = host.answers(greedy())
        for version, source in ((1, "ipc"), (2, "nccl"), (3, "ipc")):
            assert run_distributed(push, 2, untied_folders[version], host.address, host.key, version, source) == [
                "",
                "",
            ]
            answers = host.answers(greedy())
            assert difference(answers, fresh(untied_folders[version], greedy())) <= TOLERANCE
            assert difference(answers, before) > 100 * TOLERANCE
            before = answers
        for source, leave_out, break_bytes, words in (
            ("nccl", ("model.norm.weight",), False, "model.norm.weight: 64 of its 64 elements were written by no rank"),
            ("ipc", ("model.norm.weight",), False, "model.norm.weight: 64 of its 64 elements were written by no rank"),
            ("nccl", (), True, "checksums differ"),
            ("ipc", (), True, "checksums differ"),
        ):
            errors = run_distributed(
                push, 2, untied_folders[0], host.address, host.key, 4, source, leave_out, break_bytes
            )
            assert all(words in error for error in errors), errors
            with pytest.raises(RolloutError, match="not whole"):
                host.answers(greedy())
        env = plan(tmp_path / "plan", Fault("device.sum", "kill", role="rank1"))
        with pytest.raises(RankError, match="rank1 was killed by SIGKILL"):
            run_distributed(push, 2, untied_folders[0], host.address, host.key, 4, "ipc", env=env)
        with pytest.raises(RolloutError, match="not whole"):
            host.answers(greedy())
        assert run_distributed(push, 2, untied_folders[3], host.address, host.key, 5, "nccl") == ["", ""]
        assert difference(host.answers(greedy()), before) <= TOLERANCE


def test_an_engine_loses_its_loose_tensors_and_gets_them_back():
    import torch

    from megatron_dgrpo.rollout.sleeping import loose_tensors, restore_loose, save_loose

    class Method:
        def __init__(self) -> None:
            self.table = torch.arange(4.0)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("cos_sin_cache", torch.ones(3), persistent=False)
            self.plain, self.several = torch.full((2,), 5.0), [torch.full((1,), 6.0), "text"]
            self.again = self.plain
            self.quant_method = Method()

    class Worker:
        def __init__(self) -> None:
            self.model = torch.nn.Sequential(Layer())
            self.model_runner = self

        def get_model(self) -> torch.nn.Module:
            return self.model

    worker = Worker()
    layer = worker.model[0]
    found = loose_tensors(worker.model)
    assert [t.tolist() for t in found] == [[5.0, 5.0], [6.0], [0.0, 1.0, 2.0, 3.0]]
    assert {id(t) for t in found} == {id(layer.plain), id(layer.several[0]), id(layer.quant_method.table)}
    save_loose(worker)
    for tensor in (*found, layer.weight.data):
        tensor.fill_(float("nan"))
    restore_loose(worker)
    assert layer.plain.tolist() == [5.0, 5.0] and layer.quant_method.table.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert layer.weight.isnan().all()  # is an update's to bring

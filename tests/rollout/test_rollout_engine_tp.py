"""An engine cut over two processes: its answers, its updates, the bytes it copies, its end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from rollout_support import difference, engine_host, fresh, greedy, push_folder, whole_tensors

from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.launch.nursery_server import _children_of
from megatron_dgrpo.rollout.messages import TensorSpec
from megatron_dgrpo.testing.distributed import run_distributed

TOLERANCE = 1e-4


@pytest.fixture
def of_two(request):
    return request.getfixturevalue(f"{request.param}_folders")


def workers_of(host):
    """Python's own helper process, which clears shared memory away, is none."""
    children = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in _children_of(host.child.pid)}
    return [pid for pid, command in children.items() if b"resource_tracker" not in command]


@pytest.mark.parametrize("of_two", ["tied", "untied", "moe"], indirect=True)
def test_updates_of_an_engine_of_two_processes(of_two):
    with engine_host(of_two[0], tp=2) as host:
        pid, its_workers = host.client.describe().pid, workers_of(host)
        assert len(its_workers) == 2
        for worker in its_workers:  # nothing in /dev/shm outlives them, even if they are killed
            shared = [line for line in Path(f"/proc/{worker}/maps").read_text().splitlines() if "cpushm" in line]
            assert shared and all(line.endswith("(deleted)") for line in shared)
        assert difference(host.answers(greedy()), fresh(of_two[0], greedy())) <= TOLERANCE
        for version in (1, 2):
            folder = of_two[version % 2]
            assert run_distributed(push_folder, 2, folder, host.address, host.key, version) == ["", ""]
            assert difference(host.answers(greedy()), fresh(folder, greedy())) <= TOLERANCE
        assert (host.client.describe().pid, workers_of(host)) == (pid, its_workers)


def test_failures_of_both_processes_leave_the_engine_in_order(untied_folders):
    """Each worker's answer belongs to its own question, also after both have refused."""
    name = "model.layers.1.mlp.down_proj.weight"
    with engine_host(untied_folders[0], tp=2) as host:
        old = host.answers(greedy())
        with pytest.raises(TransferError, match="lm_head.weight: its shape is") as caught:
            host.client.begin_update(1, [TensorSpec("lm_head.weight", (160, 64), "float32")], "/x", 64, deadline_s=60)
        assert str(caught.value).count("lm_head.weight: its shape is") == 1  # what both say is said once
        assert difference(host.answers(greedy()), old) <= TOLERANCE
        errors = run_distributed(push_folder, 2, untied_folders[1], host.address, host.key, 1, [name])
        assert all("were written by no rank" in error for error in errors)
        with pytest.raises(RolloutError, match="not whole"):
            host.answers(greedy())
        assert run_distributed(push_folder, 2, untied_folders[0], host.address, host.key, 2) == ["", ""]
        assert difference(host.answers(greedy()), old) <= TOLERANCE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_host(number, tied_folders):
    with engine_host(tied_folders[0], tp=2) as host:
        its_workers = _children_of(host.child.pid)
        assert len(its_workers) >= 2
        host.child.kill(number)
        host.child.wait(60)
        end = time.monotonic() + 60
        while any(os.path.exists(f"/proc/{pid}") for pid in its_workers) and time.monotonic() < end:
            time.sleep(0.01)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in its_workers)


def serve_counted(report: str, **settings: object) -> None:
    """A host whose processes write down what an update copied, and how large their parameters are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_dgrpo.rollout import host
    from megatron_dgrpo.rollout.shm_engine import SharedMemoryWeightTransferEngine as Transfer

    counts = {"copied": 0}

    class Count(TorchDispatchMode):
        """Every byte that an operation writes, unless it makes a view or empty memory."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            written = [r for r in func._schema.returns if r.alias_info is None or r.alias_info.is_write]
            if written and func._schema.name.partition("::")[2] not in ("empty", "empty_like", "view", "detach"):
                counts["copied"] += out.numel() * out.element_size() if hasattr(out, "numel") else 0
            return out

    receive, finish = Transfer.receive_weights, Transfer.finish_weight_update

    def counted_receive(self, info):
        with Count():
            receive(self, info)

    def counted_finish(self):
        counts["shard"] = sum(p.numel() * p.element_size() for p in self.model.parameters())
        counts["received"] = counts["copied"]
        counts["packs"] = any("experts" in name for name, _ in self.model.named_parameters())
        with Count():
            finish(self)
        with open(f"{report}.{os.getpid()}", "w") as file:
            json.dump(counts, file)
        counts["copied"] = 0

    Transfer.receive_weights, Transfer.finish_weight_update = counted_receive, counted_finish
    host.serve(**settings)


@pytest.mark.parametrize(("of_two", "tp"), [("tied", 1), ("tied", 2), ("untied", 2), ("moe", 2)], indirect=["of_two"])
def test_each_process_copies_its_shard_and_no_more(of_two, tp, tmp_path):
    """Of experts, what is received; vLLM packs them within the process afterwards."""
    model = sum(t.nbytes for t in whole_tensors(of_two[0]).values())
    target, extra = "test_rollout_engine_tp:serve_counted", {"report": str(tmp_path / "count")}
    with engine_host(of_two[0], target=target, tp=tp, **extra) as host:
        assert run_distributed(push_folder, 2, of_two[1], host.address, host.key, 2) == ["", ""]
        counts = [json.loads(path.read_text()) for path in tmp_path.glob("count.*")]
        assert len(counts) == tp
        for count in counts:
            assert 0.9 * model / tp < count["shard"] < 1.25 * model / tp
            assert 0.8 * count["shard"] < count["received"] <= 1.02 * count["shard"]
            assert count["packs"] or count["copied"] <= 1.02 * count["shard"]

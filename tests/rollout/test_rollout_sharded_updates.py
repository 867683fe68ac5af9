"""Real updates of a model sharded over ranks, pushed to an engine: the same engine process then answers like a fresh
engine on the folder that the ranks export, with the prefix cache on, and no checkpoint file is written or read."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from rollout_support import PREFIX, VOCAB, by_sample, difference, engine_host, fresh, greedy
from weight_counters import FolderEvents, file_bytes

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

TOLERANCE = 1e-4
SIZES = {"vocab_size": VOCAB, "heads": 4, "kv_heads": 2, "layers": 4, "std": 0.2, "random_norms": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DENSE = {"tp": 2, "pp": 2, "dp": 1}


def _student_and_work(folder, axes):
    import torch

    from megatron_dgrpo.algorithms.build import sft_loss, sft_streams
    from megatron_dgrpo.config.schema import Adam
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trajectory import Segment, Trajectory
    from megatron_dgrpo.packing.trees import documents
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.update import Work

    groups = Groups(**axes)
    groups.seed(0)
    student = load_student(folder, groups=groups, options=BuildOptions(torch.float32, sequence_parallel=True))
    student.start_optimizer(Adam(lr=1e-2))
    draw = np.random.default_rng(3)
    examples = [
        Trajectory(str(i), 0, draw.integers(0, VOCAB, 4), (Segment(draw.integers(0, VOCAB, 5 + i), True),), "stop")
        for i in range(4)
    ]
    loss, factors = sft_loss()
    layouts = Packing(24, dp=1, multiple_of=4).micro_batches(documents(examples), rank=0)
    return student, Work(layouts, sft_streams(examples).streams, loss, factors, 1.0)


def train_and_push(rank, world_size, folder, axes, address, key, target):
    """Two rounds of updates, pushes and exports; rank 0 returns what the engine answered after each."""
    import torch.distributed as dist

    from megatron_dgrpo.checkpoint.hf.exporter import export_folder, export_shards, manifest
    from megatron_dgrpo.rollout.client import EngineClient
    from megatron_dgrpo.rollout.transfer import push_weights
    from megatron_dgrpo.train.update import compute_gradients

    student, work = _student_and_work(folder, axes)
    decoder = student.decoder
    dtype = decoder.config.params_dtype
    client = EngineClient.connect(address, key, deadline_s=60, owner=False) if rank == 0 else None
    seen = []
    for version in (1, 2):
        for _ in range(2):
            compute_gradients(student, work)
            student.update()
        moved = file_bytes(os.getpid())
        push_weights(
            export_shards(decoder, dtype),
            manifest(decoder.spec, dtype),
            version=version,
            store=dist.distributed_c10d._get_default_store(),
            rank=rank,
            num_ranks=world_size,
            clients=[client] if client else [],
            bucket_bytes=100_000,
            shm_prefix=PREFIX,
            deadline_s=60,
            checksums=version == 2,
        )
        moved = file_bytes(os.getpid()) - moved
        answers = by_sample(list(client.generate(greedy(), deadline_s=60))) if client else {}
        seen.append((moved, client.describe() if client else None, answers))
        export_folder(decoder, folder, os.path.join(target, f"v{version}"), dtype)
    return seen


@pytest.mark.parametrize(
    ("family", "tied", "axes"),
    [
        ("Qwen3", True, DENSE),
        ("Qwen3", False, DENSE),
        ("Llama", False, DENSE),
        ("Qwen3Moe", False, {**DENSE, "ep": 2, "etp": 1}),
    ],
)
def test_after_real_updates_the_engine_is_like_a_fresh_one(family, tied, axes, tmp_path):
    experts = EXPERTS if family == "Qwen3Moe" else {}
    folder = save_tiny(tmp_path / "trainer", family, tied=tied, **SIZES, **experts)
    own = shutil.copytree(folder, tmp_path / "engine")  # nobody but the engine has a reason to open these files
    model_bytes = (own / "model.safetensors").stat().st_size
    events = FolderEvents(own)
    with engine_host(str(own)) as host:
        assert events.since_last()["model.safetensors"] >= 1  # the counter sees vLLM's own reading
        before = host.answers(greedy())
        moved = file_bytes(host.child.pid)
        ranks = run_distributed(
            train_and_push, 4, str(folder), axes, host.address, host.key, str(tmp_path), timeout_s=180
        )
        moved = file_bytes(host.child.pid) - moved
        pid = host.child.pid
    assert not events.since_last()["model.safetensors"]
    events.close()
    assert moved < 0.05 * model_bytes
    assert all(own_bytes < 0.2 * model_bytes for rank in ranks for own_bytes, _, _ in rank)
    for version, (_, info, answers) in enumerate(ranks[0], 1):
        assert (info.pid, info.weight_version, info.whole) == (pid, version, True)
        assert difference(answers, fresh(str(tmp_path / f"v{version}"), greedy())) <= TOLERANCE
        assert difference(answers, before) > 100 * TOLERANCE
        before = answers

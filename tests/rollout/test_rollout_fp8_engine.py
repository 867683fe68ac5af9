"""FP8 engines, real ones: their answers are those of a fresh engine on the FP8 folder, update after update, and those
of the model that the FP8 numbers stand for; what does not fit is refused by name.

On CPU the kernels are this package's own (`fp8_loading`); parameters, loaders, fusion and everything else are vLLM's.
"""

from __future__ import annotations

import json
import os
from functools import partial

import numpy as np
import pytest
from rollout_support import (
    FP8_EXPERTS,
    FP8_SIZES,
    PREFIX,
    by_sample,
    difference,
    engine_host,
    greedy,
    half_shards,
    hf_logprobs_of,
    manifest_of,
    push_folder,
    whole_tensors,
    write_fp8,
)
from test_rollout_sharded_updates import DENSE, _student_and_work

from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.fp8_format import SCALE
from megatron_dgrpo.testing import run_distributed, run_forked
from megatron_dgrpo.testing.tiny import save_tiny

TOLERANCE = 1e-4
FP8 = {"dtype": "bfloat16", "quantization": "fp8"}


def of_fresh_engine(folder: str, tp: int):  # type: ignore[no-untyped-def]
    """vLLM has read the FP8 folder by itself: nothing was said about quantization."""
    with engine_host(folder, dtype="bfloat16", tp=tp) as host:
        info = host.client.describe()
        assert info.quantization == "fp8" and info.whole
        return host.answers(greedy())


def against_float32(answers, widened: str) -> float:  # type: ignore[no-untyped-def]
    """Mean difference of the log-probs to transformers' of the same tokens."""
    jobs = [(r.prompt_tokens, answers[r.prompt_id, 0][0], 1.0) for r in greedy()]
    wanted = run_forked(hf_logprobs_of, widened, jobs)
    return float(np.mean([abs(answers[r.prompt_id, 0][1] - w).mean() for r, w in zip(greedy(), wanted, strict=True)]))


def train_and_push(rank, world_size, folder, axes, address, key, target):
    """Two rounds of updates, pushes and exports in float32; rank 0 returns what the engine answered after each."""
    import torch
    import torch.distributed as dist

    from megatron_dgrpo.checkpoint.hf.exporter import export_folder, export_shards, manifest
    from megatron_dgrpo.rollout import fp8
    from megatron_dgrpo.rollout.transfer import push_weights
    from megatron_dgrpo.train.update import compute_gradients

    student, work = _student_and_work(folder, axes)
    decoder = student.decoder
    client = EngineClient.connect(address, key, deadline_s=60, owner=False) if rank == 0 else None
    seen = []
    for version in (1, 2):
        for _ in range(2):
            compute_gradients(student, work)
            student.update()
        shards, weights = fp8.quantised(
            partial(export_shards, decoder, torch.bfloat16),
            manifest(decoder.spec, torch.bfloat16),
            group=decoder.groups.world,
            device=torch.device("cpu"),
        )
        push_weights(
            shards(), weights, version=version, store=dist.distributed_c10d._get_default_store(), rank=rank,
            num_ranks=world_size, clients=[client] if client else [], bucket_bytes=100_000, shm_prefix=PREFIX,
            deadline_s=60, checksums=version == 2,
        )  # fmt: skip
        answers = by_sample(list(client.generate(greedy(), deadline_s=60))) if client else {}
        seen.append((client.describe() if client else None, answers))
    export_folder(decoder, folder, os.path.join(target, "v2"), torch.float32)
    return seen


@pytest.mark.parametrize(
    ("family", "tied", "axes", "tp"),
    [
        ("Qwen3", True, DENSE, 1),
        ("Llama", False, DENSE, 2),
        ("Qwen3Moe", False, {**DENSE, "ep": 2, "etp": 1}, 1),
    ],
)
def test_after_updates_an_fp8_engine_is_like_a_fresh_one(family, tied, axes, tp, tmp_path):
    experts = FP8_EXPERTS if family == "Qwen3Moe" else {}
    folder = str(save_tiny(tmp_path / "trainer", family, tied=tied, **FP8_SIZES, **experts))
    with engine_host(folder, tp=tp, **FP8) as host:
        before = host.client.describe()
        assert (before.quantization, before.whole) == ("fp8", False)
        with pytest.raises(RolloutError, match="not whole"):
            host.answers(greedy())  # it has random weights
        ranks = run_distributed(train_and_push, 4, folder, axes, host.address, host.key, str(tmp_path), timeout_s=180)
    (first_info, first), (info, answers) = ranks[0]
    assert (first_info.pid, first_info.weight_version, first_info.whole) == (before.pid, 1, True)
    assert (info.pid, info.weight_version, info.whole) == (before.pid, 2, True)
    assert difference(answers, first) > 100 * TOLERANCE
    narrow, widened = str(tmp_path / "fp8"), str(tmp_path / "widened")
    run_forked(write_fp8, str(tmp_path / "v2"), narrow, widened)
    assert difference(answers, of_fresh_engine(narrow, tp)) <= TOLERANCE
    ours, unquantised = against_float32(answers, widened), against_float32(answers, str(tmp_path / "v2"))
    assert ours < 0.05 and unquantised > 2 * ours


# ---- what does not fit ----


def push_fp8(rank, world_size, folder, address, key, version, leave_out=()):
    """Each rank quantises its share of every tensor. Returns the error's text, or nothing."""
    import torch
    import torch.distributed as dist

    from megatron_dgrpo.rollout import fp8
    from megatron_dgrpo.rollout.transfer import push_weights

    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in whole_tensors(folder).items()}
    shards, weights = fp8.quantised(
        partial(half_shards, tensors, rank, world_size), manifest_of(tensors), group=dist.group.WORLD,
        device=torch.device("cpu"),
    )  # fmt: skip
    clients = [EngineClient.connect(address, key, deadline_s=60, owner=False)] if rank == 0 else []
    try:
        push_weights(
            (shard for shard in shards() if shard.hf_name not in leave_out), weights, version=version,
            store=dist.distributed_c10d._get_default_store(), rank=rank, num_ranks=world_size, clients=clients,
            bucket_bytes=40_000, shm_prefix=PREFIX, deadline_s=60, checksums=version % 2 == 1,
        )  # fmt: skip
    except TransferError as error:
        return str(error)
    finally:
        for client in clients:
            client.close()
    return ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("fp8")
    return [
        str(save_tiny(home / name, dtype="bfloat16", tied=False, seed=seed, **FP8_SIZES))
        for seed, name in enumerate(("first", "second"))
    ]


def test_weights_that_do_not_fit_an_fp8_engine_are_refused_and_it_stays_as_it_is(folders, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    with engine_host(folders[0], **FP8) as host:
        args = folders[0], host.address, host.key
        assert run_distributed(push_fp8, 1, *args, 1) == [""]
        old = host.answers(greedy())
        whole = run_distributed(push_folder, 1, *args, 2)  # not quantised
        assert all(f"{name}: it is bfloat16, the engine has float8_e4m3fn" in error for error in whole)
        assert all(f"{name}{SCALE}: it is missing" in error for error in whole)
        assert not any("lm_head" in error or "norm" in error for error in whole)
        assert difference(host.answers(greedy()), old) == 0
        assert host.client.describe().weight_version == 1
        for missing in (name + SCALE, name):
            errors = run_distributed(push_fp8, 1, *args, 3, [missing])
            assert all(missing + ":" in error and "were written by no rank" in error for error in errors)
            with pytest.raises(RolloutError, match="not whole"):
                host.answers(greedy())
        assert run_distributed(push_fp8, 1, folders[1], host.address, host.key, 4) == [""]
        assert difference(host.answers(greedy()), old) > 100 * TOLERANCE
        assert run_distributed(push_fp8, 1, *args, 5) == [""]
        assert difference(host.answers(greedy()), old) == 0


def test_fp8_weights_do_not_fit_another_engine(folders):
    name = "model.layers.0.self_attn.q_proj.weight"
    with engine_host(folders[0], dtype="bfloat16") as host:
        old = host.answers(greedy())
        errors = run_distributed(push_fp8, 1, folders[1], host.address, host.key, 1)
        assert all(f"{name}: it is float8_e4m3fn, the engine has bfloat16" in error for error in errors)
        assert all(f"{name}{SCALE}: the model has no such tensor" in error for error in errors)
        assert difference(host.answers(greedy()), old) == 0


def serve_processed(flip: bool, **settings: object) -> None:
    """A host whose kernel does with loaded parameters what those for GPUs do: it puts others in their place, which have
    no loaders. With `flip`, rows are in another order there."""
    from vllm.model_executor.utils import replace_parameter

    from megatron_dgrpo.rollout import fp8_loading, host

    def process(self, layer):  # type: ignore[no-untyped-def]
        weight = layer.weight.data.flip(0) if flip else layer.weight.data
        replace_parameter(layer, "weight", weight.clone())
        replace_parameter(layer, "weight_scale_inv", layer.weight_scale_inv.data)

    fp8_loading.PlainFp8Linear.process_weights_after_loading = process
    host.serve(**settings)


PROCESSED = "test_rollout_fp8_engine:serve_processed"


def test_parameters_that_a_kernel_replaced_can_be_loaded_again(folders):
    answers = []
    for extra in ({}, {"target": PROCESSED, "flip": False}):
        with engine_host(folders[0], **extra, **FP8) as host:
            for version, folder in enumerate(folders, 1):
                assert run_distributed(push_fp8, 1, folder, host.address, host.key, version) == [""]
            answers.append(host.answers(greedy()))
    assert difference(*answers) == 0


def test_a_kernel_that_moves_weights_is_noticed(folders):
    with engine_host(folders[0], target=PROCESSED, flip=True, **FP8) as host:
        errors = run_distributed(push_fp8, 1, folders[0], host.address, host.key, 1)
        assert all("model.layers.0.mlp.down_proj: PlainFp8Linear rearranges weight" in error for error in errors)
        assert all("take another kernel" in error for error in errors)
        with pytest.raises(RolloutError, match="not whole"):
            host.answers(greedy())


def test_each_process_of_an_fp8_engine_copies_its_half_of_half_the_bytes(folders, tmp_path):
    target, extra = "test_rollout_engine_tp:serve_counted", {"report": str(tmp_path / "count")}
    whole = sum(tensor.nbytes for tensor in whole_tensors(folders[0]).values())
    with engine_host(folders[0], target=target, tp=2, **extra, **FP8) as host:
        assert run_distributed(push_fp8, 1, folders[1], host.address, host.key, 2) == [""]
    counts = [json.loads(path.read_text()) for path in tmp_path.glob("count.*")]
    assert len(counts) == 2
    for count in counts:
        assert 0.8 * count["shard"] < count["received"] <= 1.02 * count["shard"] < 0.62 * whole / 2

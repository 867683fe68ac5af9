"""What the GPU tests of transports share: a student's weights pushed to an engine on a GPU, beside a fresh engine.

Ranks and engines are processes of their own, spawned, each with its own GPUs.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "rollout"))
from rollout_support import Answers, by_sample, greedy, half_shards, make_folders, manifest_of, whole_tensors

from megatron_dgrpo.rollout.client import EngineClient

PROMPTS = greedy()


def needs(gpus: int) -> list[pytest.MarkDecorator]:
    vllm = torch.cuda.is_available() and bool(find_spec("vllm")) and bool(find_spec("vllm.cumem_allocator"))
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < gpus, reason=f"needs {gpus} CUDA device(s)"),
        pytest.mark.skipif(not vllm, reason="needs vLLM built for CUDA"),
    ]


def make_folder(folder: str, seed: int) -> str:
    """A tiny model in bfloat16."""
    from safetensors.torch import load_file, save_file

    path = Path(make_folders(folder, "untied", seed + 1)[-1])
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


class Engine:
    """An engine host on given GPUs, in bfloat16."""

    def __init__(self, folder: str, gpus: str, sleeps: bool, **more: object) -> None:
        self.address, self.key = f"tcp:127.0.0.1:{_free_port()}", secrets.token_hex(32)
        settings = dict(
            address=self.address, key=self.key, model_path=folder, dtype="bfloat16", max_model_len=512,
            kv_cache_bytes=2**26, max_num_seqs=32, prefix_cache=True, threads=1, sleeps=sleeps, **more,
        )  # fmt: skip
        code = f"from megatron_dgrpo.rollout.host import serve; serve(**{settings!r})"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
        self.process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        self.client = EngineClient.connect(self.address, self.key, deadline_s=400)

    def answers(self) -> Answers:
        return by_sample(list(self.client.generate(PROMPTS, deadline_s=120)))

    def close(self) -> None:
        self.client.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def fresh(folder: str, gpus: str) -> Answers:
    engine = Engine(folder, gpus, sleeps=False)
    try:
        return engine.answers()
    finally:
        engine.close()


def push(source: str, folder: str, engine: Engine, version: int, ranks: int = 1, *, narrow: bool = False) -> list[str]:
    """By ranks on GPUs 0, 1, ..., in FP8 if `narrow`; returns what went wrong on each."""
    context = multiprocessing.get_context("spawn")
    port, answers = _free_port(), context.Queue()
    args = (ranks, port, source, folder, engine.address, engine.key, version, narrow, answers)
    processes = [context.Process(target=_push, args=(rank, *args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(30)
    return found


def _push(rank, ranks, port, source, folder, address, key, version, narrow, answers):  # type: ignore[no-untyped-def]
    import torch.distributed as dist

    from megatron_dgrpo.rollout import fp8
    from megatron_dgrpo.rollout.device_push import push_on_device

    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks)
    clients = [EngineClient.connect(address, key, deadline_s=20, owner=False)] if rank == 0 else []
    try:
        tensors = {name: t.to(f"cuda:{rank}", torch.bfloat16) for name, t in whole_tensors(folder).items()}
        shards, weights, device = partial(half_shards, tensors, rank, ranks), manifest_of(tensors), f"cuda:{rank}"
        if narrow:
            shards, weights = fp8.quantised(shards, weights, group=dist.group.WORLD, device=torch.device(device))
        push_on_device(
            shards(), weights, source=source, version=version,
            store=dist.PrefixStore("weights", store), group=dist.group.WORLD, device=torch.device("cuda", rank),
            clients=clients, engine_ranks=[len(c.describe().gpus) for c in clients], bucket_bytes=40_000,
            deadline_s=120, checksums=True,
        )  # fmt: skip
        answers.put("")
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")
    finally:
        for client in clients:
            client.close()
        time.sleep(1)  # rank 0 has the store
        dist.destroy_process_group()


def assert_alike(left: Answers, right: Answers) -> None:
    """bfloat16 in the same engine, graphs and batch shapes: the same tokens, log-probs within 2 %."""
    for sample, (tokens, logprobs) in left.items():
        assert tokens.tolist() == right[sample][0].tolist()
        assert abs(logprobs - right[sample][1]).max() <= 0.02 * abs(logprobs).max()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

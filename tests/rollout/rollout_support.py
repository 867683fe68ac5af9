"""What the rollout tests share: tiny models in Hugging Face folders, an engine host, ranks that push weights to it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dgrpo.launch.nursery import Child
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.messages import Completion, GenerateRequest
from megatron_dgrpo.testing.distributed import run_forked, session_nursery

VOCAB = 161
CONTEXT = 512
BLOCK = 128  # vLLM's on CPU
PREFIX = "dgrpo-push-"
FP8_SIZES = dict(
    vocab_size=VOCAB, hidden=256, heads=8, kv_heads=4, head_dim=64, layers=2, intermediate=256, std=0.1,
    random_norms=True,
)  # fmt: skip
FP8_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
"""Of models whose every matrix has whole blocks, on two ranks, too."""


# ---- models; these run where torch is ----


def make_folders(folder: str, kind: str, count: int) -> list[str]:
    """Versions v0, v1, ... of one tiny model: every weight of each is random, norms included."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=kind == "tied",
    )
    if kind == "moe":
        config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    else:
        config = Qwen3Config(**sizes)
    paths = []
    for version in range(count):
        torch.manual_seed(version)
        model = (Qwen3MoeForCausalLM if kind == "moe" else Qwen3ForCausalLM)(config).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        paths.append(os.path.join(folder, f"v{version}"))
        model.save_pretrained(paths[-1])
    return paths


def write_fp8(source: str, target: str, widened: str) -> None:
    """The FP8 folder of a folder, and one with the numbers that it stands for, in float32."""
    import torch
    from safetensors.torch import save_file

    from megatron_dgrpo.rollout import fp8
    from megatron_dgrpo.rollout.fp8_format import SCALE, is_quantised, quantisation_config

    narrow, wide = {}, {}
    for name, tensor in whole_tensors(source).items():
        if is_quantised(name, tensor.shape):
            narrow[name], narrow[name + SCALE] = fp8.quantise(tensor)
            wide[name] = fp8.dequantise(narrow[name], narrow[name + SCALE])
        else:
            narrow[name] = tensor.to(torch.bfloat16)
            wide[name] = narrow[name].float()
    for folder, tensors in ((target, narrow), (widened, wide)):
        shutil.copytree(source, folder)
        save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    path = os.path.join(target, "config.json")
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump({**config, "quantization_config": quantisation_config(list(narrow))}, file)


def hf_logprobs(folder: str, prompt: np.ndarray, tokens: np.ndarray, temperature: float) -> np.ndarray:
    """transformers' log-probs of the tokens of a response, under a temperature."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids_T = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
    with torch.no_grad():
        logits_TV = model(ids_T[None]).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = torch.log_softmax(logits_TV.double() / temperature, -1)
    return logprobs_TV.gather(1, ids_T[len(prompt) :, None])[:, 0].float().numpy()


def hf_logprobs_of(folder: str, jobs: list[tuple[np.ndarray, np.ndarray, float]]) -> list[np.ndarray]:
    return [hf_logprobs(folder, *job) for job in jobs]


# ---- requests and answers ----


def greedy(count: int = 3, length: int = 300, max_tokens: int = 24) -> list[GenerateRequest]:
    """Prompts of more than two blocks that begin alike, so that the prefix cache is used between them, too."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, length).astype(np.int32)
    own = [np.concatenate([prompt, rng.integers(0, VOCAB, 5 + i).astype(np.int32)]) for i in range(count)]
    return [GenerateRequest(f"p{i}", own[i], (0,), max_tokens, 0.0, ()) for i in range(count)]


Answers = dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]


def by_sample(completions: Sequence[Completion]) -> Answers:
    return {(c.prompt_id, c.sample): (c.tokens, c.logprobs) for c in completions}


def difference(left: Answers, right: Answers) -> float:
    """Largest difference of log-probs; infinite where tokens differ."""
    assert left.keys() == right.keys() and left
    pairs = [(left[key], right[key]) for key in left]
    if any(not np.array_equal(a[0], b[0]) for a, b in pairs):
        return float("inf")
    return max(float(np.abs(a[1] - b[1]).max()) for a, b in pairs)


# ---- engines ----


def make_engine(folder: str, **settings: object):  # type: ignore[no-untyped-def]
    """An engine in this very process, with the environment of a host."""
    from megatron_dgrpo.rollout import host

    os.environ.update(host._ENVIRONMENT)
    tempfile.tempdir = os.path.dirname(folder)  # vLLM leaves a file behind
    from megatron_dgrpo.rollout.engine import Engine

    usual = dict(dtype="float32", max_model_len=CONTEXT, kv_cache_bytes=2**26, max_num_seqs=32)
    return Engine(**{**usual, "prefix_cache": True, "threads": 1, "model_path": folder, **settings})


def run_engine(engine, requests: Sequence[GenerateRequest]) -> Answers:  # type: ignore[no-untyped-def]
    for request in requests:
        for sample in range(len(request.seeds)):
            engine.add(f"{request.prompt_id}/{sample}", request, sample)
    completions = []
    while engine.num_unfinished:
        completions += [completion for _, completion in engine.step()]
    return by_sample(completions)


def _fresh(folder: str, requests: Sequence[GenerateRequest]) -> Answers:
    return run_engine(make_engine(folder), requests)


def fresh(folder: str, requests: Sequence[GenerateRequest]) -> Answers:
    """What an engine that has just loaded a folder answers."""
    return run_forked(_fresh, folder, requests, preload="engine")


def free_port() -> int:
    """One that no connection is given of itself: such ports lie above."""
    for port in random.sample(range(10_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@dataclass
class Host:
    child: Child
    client: EngineClient
    address: str
    key: str

    def connect(self, **settings: object) -> EngineClient:
        return EngineClient.connect(self.address, self.key, **{"deadline_s": 60, "owner": False, **settings})  # type: ignore[arg-type]

    def answers(self, requests: Sequence[GenerateRequest]) -> Answers:
        return by_sample(list(self.client.generate(requests, deadline_s=60)))


@contextlib.contextmanager
def engine_host(
    folder: str, *, address: str = "", target: str = "megatron_dgrpo.rollout.host:serve", **settings: object
) -> Iterator[Host]:
    """A host in a process of its own, and the client that owns it."""
    server = session_nursery("engine")
    server.wait_ready()
    home = Path(tempfile.mkdtemp(prefix="dgrpo-host-"))
    address, key = address or f"unix:{home}/engine", secrets.token_hex(32)
    args = dict(
        address=address,
        key=key,
        model_path=folder,
        dtype="float32",
        max_model_len=CONTEXT,
        kv_cache_bytes=2**26,
        max_num_seqs=32,
        prefix_cache=True,
        threads=1,
    )
    child = server.start("engine", target, {**args, **settings}, log_path=home / "log")
    try:
        try:
            client = EngineClient.connect(address, key, deadline_s=150)
        except BaseException:
            print(child.last_words(80))
            raise
        yield Host(child, client, address, key)
        client.close()
    finally:
        if child.poll() not in (None, 0):
            print(child.last_words(80))
        child.kill()
        child.wait(60)
        shutil.rmtree(home)


# ---- ranks that push; these run in processes of their own ----


def whole_tensors(folder: str):  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    return dict(sorted(load_file(os.path.join(folder, "model.safetensors")).items()))


def manifest_of(tensors):  # type: ignore[no-untyped-def]
    from megatron_dgrpo.checkpoint.hf.shards import WeightSpec

    return [WeightSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def half_shards(tensors, rank: int, world_size: int, leave_out: Sequence[str] = ()):  # type: ignore[no-untyped-def]
    """This rank's share of every tensor: along the last axis of matrices, the whole of every second vector."""
    from megatron_dgrpo.checkpoint.hf.shards import WeightShard

    for index, (name, t) in enumerate(tensors.items()):
        box = [(0, n) for n in t.shape]
        if t.ndim > 1:
            cuts = [t.shape[-1] * r // world_size for r in range(world_size + 1)]
            box[-1] = (cuts[rank], cuts[rank + 1])
        elif index % world_size != rank:
            continue
        if name not in leave_out:
            yield WeightShard(name, tuple(t.shape), t.dtype, tuple(box), t[tuple(slice(*b) for b in box)])


def push_folder(
    rank: int,
    world_size: int,
    folder: str,
    address: str,
    key: str,
    version: int,
    leave_out: Sequence[str] = (),
    bucket_bytes: int = 40_000,
) -> str:
    """Each rank writes its half of every tensor. Returns the error's text, or nothing."""
    import torch.distributed as dist

    from megatron_dgrpo.errors import TransferError
    from megatron_dgrpo.rollout.transfer import push_weights

    tensors = whole_tensors(folder)
    clients = [EngineClient.connect(address, key, deadline_s=60, owner=False)] if rank == 0 else []
    try:
        push_weights(
            half_shards(tensors, rank, world_size, leave_out),
            manifest_of(tensors),
            version=version,
            store=dist.distributed_c10d._get_default_store(),
            rank=rank,
            num_ranks=world_size,
            clients=clients,
            bucket_bytes=bucket_bytes,
            shm_prefix=PREFIX,
            deadline_s=60,
            checksums=version % 2 == 1,
        )
    except TransferError as error:
        return str(error)
    finally:
        for client in clients:
            client.close()
    return ""

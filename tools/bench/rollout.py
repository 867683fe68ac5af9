"""Tokens per second of an engine host: G samples of one long prompt. One JSON line per case; status 1 on a miss.

    python tools/bench/rollout.py [--quick]

Four engines of one model and of the same settings stand side by side, each in a process of its own with one thread,
and are asked in turns for G samples of a prompt that none of them has seen; a case's figure is that of its best round.

    host            an engine host, over its socket, with its prefix cache: the prompt is computed once
    host, no cache  the same without the prefix cache: the prompt is computed G times
    bare            vLLM's own LLM.generate, without this package's plugin, with its prefix cache
    bare, packed    the same with linear weights packed as an engine host on CPU packs them, where updates can write

The ratios: host to bare (at least 0.9), to bare, packed (what is left is the host), and to no cache. Tokens are the
generated ones. Seconds are processor time of the engine's process and its client's together, from the request to the
last answer, the prompt's computation included: on a machine that does nothing else they are the clock's, which stands
beside them, and others do not stretch them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _measure import Report

from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.messages import GenerateRequest
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.distributed import session_nursery
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

MODEL = {"vocab_size": 4096, "hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 768}
_START_S, _ROUND_S = 300.0, 600.0


def prompt(number: int, length: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, MODEL["vocab_size"], length).astype(np.int32)


def bare_server(
    *, address: str, folder: str, packed: bool, context: int, num_seqs: int, max_tokens: int, prompt_tokens: int
) -> None:
    """vLLM alone. A line with a number asks for a round with that prompt; the answer is its seconds and tokens."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_CI_ENV="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        OMP_NUM_THREADS="1",
    )
    tempfile.tempdir = folder
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import tokens_input

    if packed:
        from megatron_dgrpo.rollout.vllm_plugin import pack_linear_weights

        pack_linear_weights()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=context,
        kv_cache_memory_bytes=kv_cache_bytes(context, num_seqs),
        max_num_seqs=num_seqs,
        enable_prefix_caching=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(context, 8192),
        logprobs_mode="processed_logprobs",
        enforce_eager=True,
    )

    def generate(number: int, count: int) -> str:
        params = [
            SamplingParams(
                max_tokens=max_tokens, seed=i, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False
            )
            for i in range(count)
        ]
        tokens = prompt(number, prompt_tokens).tolist()
        clock, start = time.perf_counter(), time.process_time()
        found = llm.generate([tokens_input(tokens)] * count, params, use_tqdm=False)
        seconds = time.process_time() - start
        return f"{seconds} {time.perf_counter() - clock} {sum(len(answer.outputs[0].token_ids) for answer in found)}"

    generate(0, 1)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        lines = sock.makefile("rw")
        for line in lines:
            print(generate(int(line), num_seqs), file=lines, flush=True)


def kv_cache_bytes(context: int, num_seqs: int) -> int:
    """Room for all sequences without a shared prefix, and as much again for prompts of earlier rounds."""
    per_token = 2 * MODEL["layers"] * MODEL["kv_heads"] * MODEL["head_dim"] * 4
    return 2 * num_seqs * (context + 128) * per_token


Round = Callable[[int], tuple[float, float, int]]
"""The prompt's number -> processor's seconds, clock's seconds, tokens."""


def processor_time(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    return sum(int(f.read_text().split()[0]) for f in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@contextlib.contextmanager
def bare(folder: str, sizes: dict[str, int], *, packed: bool) -> Iterator[Round]:
    with tempfile.TemporaryDirectory() as home, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{home}/bare")
        listener.listen(1)
        listener.settimeout(_START_S)
        settings = {"address": f"{home}/bare", "folder": folder, "packed": packed, **sizes}
        child = session_nursery("engine").start("bare", "rollout:bare_server", settings, log_path=Path(home) / "log")
        try:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise SystemExit(child.last_words(40)) from None
            connection.settimeout(_ROUND_S)
            lines = connection.makefile("rw")

            def ask(number: int) -> tuple[float, float, int]:
                print(number, file=lines, flush=True)
                seconds, clock, tokens = lines.readline().split()
                return float(seconds), float(clock), int(tokens)

            yield ask
            connection.close()
        finally:
            child.kill()
            child.wait(10)


@contextlib.contextmanager
def host(folder: str, sizes: dict[str, int], *, prefix_cache: bool) -> Iterator[Round]:
    context, num_seqs = sizes["context"], sizes["num_seqs"]
    with tempfile.TemporaryDirectory() as home:
        address, key = f"unix:{home}/host", secrets.token_hex(32)
        settings: dict[str, Any] = dict(
            address=address,
            key=key,
            model_path=folder,
            dtype="float32",
            max_model_len=context,
            kv_cache_bytes=kv_cache_bytes(context, num_seqs),
            max_num_seqs=num_seqs,
            prefix_cache=prefix_cache,
            threads=1,
        )
        log = Path(home) / "log"
        child = session_nursery("engine").start("host", "megatron_dgrpo.rollout.host:serve", settings, log_path=log)
        try:
            client = EngineClient.connect(address, key, deadline_s=_START_S)

            def ask(number: int, count: int = num_seqs) -> tuple[float, float, int]:
                tokens = prompt(number, sizes["prompt_tokens"])
                request = GenerateRequest("p", tokens, tuple(range(count)), sizes["max_tokens"], 1.0, ())
                clock, start = time.perf_counter(), processor_time(child.pid) + time.process_time()
                found = list(client.generate([request], deadline_s=_ROUND_S))
                seconds = processor_time(child.pid) + time.process_time() - start
                return seconds, time.perf_counter() - clock, sum(len(c.tokens) for c in found)

            ask(0, 1)
            yield ask
            client.close()
        finally:
            child.kill()
            child.wait(10)


def save_model(rank: int, world_size: int, folder: str, context: int) -> None:
    save_tiny_qwen3(folder, tied=True, seed=0, max_positions=context, **MODEL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short prompt")
    quick = parser.parse_args().quick
    prompt_tokens, max_tokens, rounds = (1024, 32, 10) if quick else (4096, 128, 5)
    sizes = {
        "context": prompt_tokens + max_tokens,
        "num_seqs": 8,
        "max_tokens": max_tokens,
        "prompt_tokens": prompt_tokens,
    }
    report = Report()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run_distributed(save_model, 1, folder, sizes["context"])
        session_nursery("engine").wait_ready()
        cases = {
            "bare": stack.enter_context(bare(folder, sizes, packed=False)),
            "bare, packed": stack.enter_context(bare(folder, sizes, packed=True)),
            "host": stack.enter_context(host(folder, sizes, prefix_cache=True)),
            "host, no cache": stack.enter_context(host(folder, sizes, prefix_cache=False)),
        }
        speeds: dict[str, list[float]] = {name: [] for name in cases}
        clocks: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(1, rounds + 1):
            for name, ask in cases.items():
                seconds, clock, tokens = ask(number)
                assert tokens == 8 * max_tokens, f"{name} gave {tokens} tokens"
                speeds[name].append(tokens / seconds)
                clocks[name].append(tokens / clock)
        best = {name: max(found) for name, found in speeds.items()}
        shape: dict[str, Any] = {"prompt": prompt_tokens, "tokens": max_tokens, "samples": 8, "rounds": rounds}
        for name, found in speeds.items():
            by_clock = max(clocks[name])
            report.line(
                name, **shape, tokens_per_s=best[name], slowest_round=min(found), tokens_per_s_by_clock=by_clock
            )
        report.line("host to bare", ratio=best["host"] / best["bare"], target=0.9, at_most=False)
        report.line("host to bare, packed", ratio=best["host"] / best["bare, packed"])
        target = 1.0 if quick else 2.0
        shared = best["host"] / best["host, no cache"]
        report.line("shared prefix to none", ratio=shared, target=target, at_most=False)
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())

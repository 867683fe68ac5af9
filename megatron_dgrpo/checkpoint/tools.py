"""The command lines of the conversion tools: arguments, ranks, messages, exit status.

A tool runs alone, under torchrun, or starts its own ranks when it is alone and told of a layout that needs several. It
uses the host's memory only: graphics devices are hidden before torch is imported.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_dgrpo.errors import DGRPOError

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _prepare(num_ranks: int) -> None:
    """Before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1" if num_ranks > 1 or "RANK" in os.environ else str(os.cpu_count()))
    if num_ranks > 1 and "RANK" not in os.environ:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        os.execv(sys.executable, [sys.executable, *run, *sys.argv])


def _run(work: Callable[[], str]) -> int:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no device is in sight, as is wanted
    importlib.import_module("megatron_dgrpo.parallel.preload")  # the platform comes before Megatron
    from megatron_dgrpo.checkpoint.convert import world

    first = os.environ.get("RANK", "0") == "0"
    try:
        with world():
            words = work()
    except DGRPOError as error:
        if first:  # what fails on one rank is known on all
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2.0)  # torchrun ends the others as soon as one is gone: the first has something to say
        return 1
    if first:
        print(words)
    return 0


def convert_hf_to_megatron(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face folder into a Megatron checkpoint.")
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint; must not exist")
    parser.add_argument("--tp", type=int, help="ranks that share the model by tensor parallelism (all that there are)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--ep", type=int, help="ranks that share the experts (the most that fit)")
    parser.add_argument("--dtype", choices=_DTYPES, help="type of the checkpoint (that of most tensors in the folder)")
    given = parser.parse_args(arguments)
    tp, ep = given.tp or 1, given.ep or 1
    _prepare(given.pp * tp * ep // math.gcd(tp, ep))

    def work() -> str:
        from megatron_dgrpo.checkpoint.convert import hf_to_megatron

        return hf_to_megatron(given.hf, given.out, tp=given.tp, pp=given.pp, ep=given.ep, dtype=given.dtype)

    return _run(work)


def convert_megatron_to_hf(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert a Megatron checkpoint into a Hugging Face folder.")
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="a checkpoint of this project")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder; must not exist")
    parser.add_argument("--dtype", choices=_DTYPES, help="type of the weights (that of the checkpoint)")
    given = parser.parse_args(arguments)
    _prepare(1)

    def work() -> str:
        from megatron_dgrpo.checkpoint.convert import megatron_to_hf

        return megatron_to_hf(given.megatron, given.out, dtype=given.dtype)

    return _run(work)


def verify_conversion(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a Megatron checkpoint with a Hugging Face folder.")
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="a checkpoint of this project")
    given = parser.parse_args(arguments)
    _prepare(1)

    def work() -> str:
        from megatron_dgrpo.checkpoint.verify import verify

        return verify(given.hf, given.megatron)

    return _run(work)

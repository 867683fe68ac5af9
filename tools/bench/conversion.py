#!/usr/bin/env python
"""How fast and how lean conversion is, against plain reading and writing in the same run.

Prints one JSON line per case; the exit status is 1 when a target is missed. The model (1.1 GiB in bfloat16; with
--quick 0.3 GiB) is made on the spot. Every measurement has fresh processes, whose memory nobody has touched yet, and
rounds of the two sides alternate; the medians count. Files are in the page cache.

import  peer: the same ranks read the files, each an equal share, and copy them into fresh memory
export  peer: one process writes the same tensors with safetensors and fsync
peak    the most private and own shared memory of a rank above its imports; limit 1.25 x shard + 256 MiB
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.memory import Peak

TARGET = 0.5
SPARE = 256 << 20


# ---- What the ranks do; each returns seconds, peak bytes and the bytes of its shard ----------------------------------


def _timed(work: Callable[[], Any]) -> float:
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def _decoder(folder: str, world: int) -> Any:
    import torch

    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups

    return build_decoder(read_spec(folder), groups=Groups(tp=world, dp=1), options=BuildOptions(dtype=torch.bfloat16))


def _shard(decoder: Any) -> int:
    return sum(parameter.nbytes for parameter in decoder.parameters())


def import_model(rank: int, world: int, folder: str) -> tuple[float, int, int]:
    from megatron_dgrpo.checkpoint.hf.importer import import_weights

    with Peak() as peak:
        decoder = _decoder(folder, world)
        seconds = _timed(lambda: import_weights(decoder, folder))
    return seconds, peak.bytes, _shard(decoder)


def read_and_copy(rank: int, world: int, folder: str) -> tuple[float, int, int]:
    import torch

    path = Path(folder) / "model.safetensors"
    share = path.stat().st_size // world

    def work() -> None:
        fresh, done = torch.empty(share, dtype=torch.uint8), 0
        into, file = memoryview(fresh.numpy()), os.open(path, os.O_RDONLY)
        while done < share:
            done += os.preadv(file, [into[done : done + (32 << 20)]], rank * share + done)
        os.close(file)

    return _timed(work), 0, 0


def export_model(rank: int, world: int, folder: str, target: str) -> tuple[float, int, int]:
    import torch

    from megatron_dgrpo.checkpoint.hf.exporter import export_folder
    from megatron_dgrpo.checkpoint.hf.importer import import_weights

    with Peak() as peak:
        decoder = _decoder(folder, world)
        import_weights(decoder, folder)
        seconds = _timed(lambda: export_folder(decoder, folder, target, torch.bfloat16))
    return seconds, peak.bytes, _shard(decoder)


def write_plainly(rank: int, world: int, folder: str, target: str) -> tuple[float, int, int]:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}

    def work() -> None:
        os.mkdir(target)
        save_file(tensors, Path(target) / "model.safetensors", metadata={"format": "pt"})
        file = os.open(Path(target) / "model.safetensors", os.O_RDWR)
        os.fsync(file)
        os.close(file)

    return _timed(work), 0, 0


def save_checkpoint(rank: int, world: int, folder: str, target: str) -> tuple[float, int, int]:
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.checkpoint.megatron import save_megatron

    with Peak() as peak:
        decoder = _decoder(folder, world)
        import_weights(decoder, folder)
        seconds = _timed(lambda: save_megatron(decoder, folder, target))
    return seconds, peak.bytes, _shard(decoder)


def load_checkpoint(rank: int, world: int, folder: str, saved: str) -> tuple[float, int, int]:
    from megatron_dgrpo.checkpoint.megatron import load_megatron

    with Peak() as peak:
        decoder = _decoder(folder, world)
        seconds = _timed(lambda: load_megatron(decoder, saved))
    return seconds, peak.bytes, _shard(decoder)


# ---- The model -----------------------------------------------------------------------------------------------------


def make_model(rank: int, world: int, folder: str, layers: int, vocab: int) -> int:
    """A Qwen3 of random weights, written tensor by tensor out of one block of random numbers; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from megatron_dgrpo.checkpoint.hf.exporter import manifest
    from megatron_dgrpo.checkpoint.hf.families import read_spec

    os.mkdir(folder)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": layers, "hidden_size": 1024,
        "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": vocab, "tie_word_embeddings": False, "rope_theta": 1e6, "dtype": "bfloat16",
    }  # fmt: skip
    (Path(folder) / "config.json").write_text(json.dumps(config))
    specs = manifest(read_spec(folder), torch.bfloat16)
    sizes = [torch.Size(spec.global_shape).numel() for spec in specs]
    block = torch.randn(1 << 20).bfloat16().repeat(-(-max(sizes) // (1 << 20)))
    tensors = {
        spec.hf_name: block[:size].view(spec.global_shape).clone() for spec, size in zip(specs, sizes, strict=True)
    }
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    os.sync()
    return 2 * sum(sizes)


# ---- The cases -----------------------------------------------------------------------------------------------------


def _round(home: Path, work: Callable[..., Any], ranks: int, *args: str) -> list[tuple[float, int, int]]:
    os.sync()
    results = run_distributed(work, ranks, *args, timeout_s=600)
    shutil.rmtree(home / "written", ignore_errors=True)
    return results


def _report(name: str, ranks: int, **values: Any) -> bool:
    print(json.dumps({"name": name, "ranks": ranks, **values}), flush=True)
    return bool(values["ok"])


def _compare(home: Path, name: str, ours: Any, peers: Any, *, ranks: int, peer_ranks: int, rounds: int) -> bool:
    """Speed of one case, and its peak."""
    source, written = str(home / "model"), (str(home / "written"),) if name == "export" else ()
    own, other, peaks = [], [], [(0, 0)]
    for _ in range(rounds):
        other.append(_round(home, peers, peer_ranks, source, *written)[0][0])
        results = _round(home, ours, ranks, source, *written)
        own.append(results[0][0])
        peaks += [(peak, shard) for _, peak, shard in results]
    seconds, peer = statistics.median(own), statistics.median(other)
    ratio = peer / seconds
    speed = _report(
        name, ranks, seconds=round(seconds, 3), peer_seconds=round(peer, 3), ratio=round(ratio, 3), target=TARGET,
        ok=ratio >= TARGET,
    )  # fmt: skip
    return _report_peak(name, ranks, peaks) and speed


def _report_peak(name: str, ranks: int, peaks: list[tuple[int, int]], **values: Any) -> bool:
    peak, shard = max(peaks)
    limit = int(1.25 * shard) + SPARE
    return _report(
        f"{name} peak", ranks, **values, peak_mib=peak >> 20, shard_mib=shard >> 20, limit_mib=limit >> 20,
        ratio=round(peak / limit, 3), target=1.0, ok=peak <= limit,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmark of conversion")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds: under a minute")
    parser.add_argument("--home", type=Path, help="where to write, on the disk to measure (a temporary folder)")
    quick = parser.parse_args().quick
    rounds, ok = 1 if quick else 5, True
    with tempfile.TemporaryDirectory(dir=parser.parse_args().home, prefix="conversion-") as folder:
        home = Path(folder)
        layers, vocab = (4, 50_000) if quick else (16, 151_936)
        size = run_distributed(make_model, 1, str(home / "model"), layers, vocab)[0]
        print(json.dumps({"name": "model", "gib": round(size / 2**30, 2)}), flush=True)
        for ranks in (1, 2):
            pair = {"ranks": ranks, "rounds": rounds}
            ok &= _compare(home, "import", import_model, read_and_copy, peer_ranks=ranks, **pair)
            ok &= _compare(home, "export", export_model, write_plainly, peer_ranks=1, **pair)
            saved = run_distributed(save_checkpoint, ranks, str(home / "model"), str(home / "saved"), timeout_s=600)
            seconds = {"seconds": round(saved[0][0], 3)}
            ok &= _report_peak("checkpoint save", ranks, [r[1:] for r in saved], **seconds)
            loaded = run_distributed(load_checkpoint, ranks, str(home / "model"), str(home / "saved"), timeout_s=600)
            seconds = {"seconds": round(loaded[0][0], 3)}
            ok &= _report_peak("checkpoint load", ranks, [r[1:] for r in loaded], **seconds)
            shutil.rmtree(home / "saved")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

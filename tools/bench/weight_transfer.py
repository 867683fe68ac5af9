#!/usr/bin/env python
"""How fast weights go from a sharded trainer to an engine, and what memory that takes, against a plain copy.

Prints one JSON line per case; the exit status is 1 when a target is missed. The model (1.05 GiB in bfloat16; with
--quick 0.3 GiB) is made on the spot. An engine host loads it, and each trainer layout imports and pushes it several
times. The floor is a copy of the same bytes into memory that has been touched before, in the engine's process, after
each push; the medians count.

receiving   the engine's part: what vLLM's worker does from the manifest to the end, against the floor
packing     what the first products after a push take longer: they pack the weights of linear layers where they lie. It
            moves bytes within their own memory, engine and trainer do not wait for each other, and there is no target
end to end  `push_weights` on all ranks, from the sharded parameters to the engine's last answer, against the floor
memory      the most private and shared memory that a process held during a push, above what it held before; the limit
            is the two slots of the file, and 24 MiB

On a busy machine a clock says who else was running: `cpu` lines compare processor time, of all processes that take
part, and the targets are theirs if --cpu is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conversion import Peak, make_model

from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.distributed import session_nursery

RECEIVING, END_TO_END = 0.4, 0.25
SPARE = 24 << 20
PREFIX = "dgrpo-bench-"


# ---- The engine's process --------------------------------------------------------------------------------------------


def serve_measured(report: str, **settings: Any) -> None:
    """An engine host that writes down what each update took, and then the floor."""
    from megatron_dgrpo.rollout import host
    from megatron_dgrpo.rollout.messages import BeginUpdate, FinishUpdate
    from megatron_dgrpo.rollout.shm_engine import SharedMemoryWeightTransferEngine as Transfer

    seen: dict[str, Any] = {}

    def timed(name: str) -> None:
        inner = getattr(Transfer, name)

        def outer(self: Any, *args: Any) -> None:
            if name == "init_transfer_engine":
                seen.update(seconds=0.0, cpu=0.0, memory=os.path.exists(f"{report}.memory"))
                if seen["memory"]:
                    seen["peak"] = Peak()
                    seen["peak"].__enter__()
            start, cpu = time.perf_counter(), time.thread_time()
            inner(self, *args)
            seen["seconds"] += time.perf_counter() - start
            seen["cpu"] += time.thread_time() - cpu
            if name == "finish_weight_update":
                if seen["memory"]:
                    seen["peak"].__exit__()
                seen.update(model=self.model, bytes=self.copied_bytes)

        setattr(Transfer, name, outer)

    for name in ("init_transfer_engine", "start_weight_update", "receive_weights", "finish_weight_update"):
        timed(name)
    answer = host.Host._update

    def then_floor(self: Any, peer: Any, message: Any) -> None:
        """The floor is measured when the trainer has its answer, so that it does not wait for that."""
        if isinstance(message, BeginUpdate):
            seen["begun"] = time.process_time()
        answer(self, peer, message)
        if isinstance(message, FinishUpdate):
            self.server.flush(5.0)
            used = time.process_time() - seen["begun"]
            found = {"seconds": seen["seconds"], "cpu": seen["cpu"], "all_cpu": used, "bytes": seen["bytes"]}
            found["peak"] = seen["peak"].bytes if seen["memory"] else 0
            floor = dict(zip(("floor", "floor_cpu"), _plain_copy(seen["model"]), strict=True))
            packing = dict(zip(("pack", "pack_cpu"), _pack(seen["model"]), strict=True))
            with open(report, "a") as file:
                file.write(json.dumps({**found, **floor, **packing}) + "\n")

    host.Host._update = then_floor  # type: ignore[method-assign]
    host.serve(**settings)


def _plain_copy(model: Any) -> tuple[float, float]:
    """The bytes of all parameters into memory that has been touched: the best of three."""
    import torch

    flat = [parameter.data.view(-1) for parameter in model.parameters()]
    size = max(part.numel() for part in flat)
    target, best = torch.zeros(size, dtype=flat[0].dtype), (float("inf"), float("inf"))
    for _ in range(3):
        start, cpu = time.perf_counter(), time.thread_time()
        for part in flat:
            target[: part.numel()].copy_(part)
        best = min(best[0], time.perf_counter() - start), min(best[1], time.thread_time() - cpu)
    return best


def _pack(model: Any) -> tuple[float, float]:
    """As the first products do it."""
    from megatron_dgrpo.rollout.packed_linear import Form, PackedWeight

    start, cpu = time.perf_counter(), time.thread_time()
    for module in model.modules():
        packed = vars(module).get("cpu_linear")
        if isinstance(packed, PackedWeight):
            assert packed.form is Form.PLAIN, "an update left a weight packed"
            packed.pack(module.weight)
    return time.perf_counter() - start, time.thread_time() - cpu


# ---- The trainer's ranks ---------------------------------------------------------------------------------------------


def push(rank: int, world: int, folder: str, address: str, key: str, bucket_bytes: int, rounds: int, base: int) -> Any:
    """Seconds, processor seconds and, of the last one, peak bytes of each push: who watches memory takes time."""
    import torch
    import torch.distributed as dist

    from megatron_dgrpo.checkpoint.hf.exporter import export_shards, manifest
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.rollout.transfer import push_weights

    groups = Groups(tp=world, dp=1)
    decoder = build_decoder(read_spec(folder), groups=groups, options=BuildOptions(torch.bfloat16))
    import_weights(decoder, folder)
    clients = [EngineClient.connect(address, key, deadline_s=60, owner=False)] if rank == 0 else []
    found: list[tuple[float, ...]] = []
    for version in range(base + 1, base + rounds + 1):
        watched = version == base + rounds
        if rank == 0 and watched:
            Path(folder).with_name("report.memory").touch()
        dist.barrier()
        with Peak() if watched else contextlib.nullcontext() as peak:
            start, cpu = time.perf_counter(), time.process_time()
            push_weights(
                export_shards(decoder, torch.bfloat16),
                manifest(decoder.spec, torch.bfloat16),
                version=version,
                store=dist.distributed_c10d._get_default_store(),
                rank=rank,
                num_ranks=world,
                clients=clients,
                bucket_bytes=bucket_bytes,
                shm_prefix=PREFIX,
                deadline_s=300,
            )
            found.append((time.perf_counter() - start, time.process_time() - cpu))
        found[-1] += (peak.bytes if peak else 0,)
        for client in clients:
            client.describe()  # when the floor has been measured
    return found


# ---- The cases -------------------------------------------------------------------------------------------------------


def _line(name: str, ok: bool = True, **values: Any) -> bool:
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"name": name, **rounded, "ok": ok}), flush=True)
    return ok


def _speed(name: str, floor: float, seconds: float, target: float, counts: bool, **facts: Any) -> bool:
    ratio = floor / seconds
    ok = ratio >= target
    _line(name, ok, **facts, seconds=seconds, floor=floor, ratio=ratio, target=target, counts=counts)
    return ok or not counts


def _case(home: Path, host: tuple[str, str], ranks: int, bucket_bytes: int, rounds: int, use_cpu: bool) -> bool:
    report = home / "report"
    report.write_text("")
    report.with_suffix(".memory").unlink(missing_ok=True)
    base = EngineClient.connect(*host, deadline_s=60, owner=False)
    version = base.describe().weight_version
    base.close()
    args = (str(home / "model"), *host, bucket_bytes, rounds + 1, version)
    pushed = run_distributed(push, ranks, *args, timeout_s=900)
    received = [json.loads(line) for line in report.read_text().splitlines()]
    peaks = {"trainer": max(rank[-1][2] for rank in pushed), "engine": received[-1]["peak"]}
    pushed, received = [rank[:-1] for rank in pushed], received[:-1]
    assert len(received) == rounds
    facts: dict[str, Any] = {"ranks": ranks, "bucket_mib": bucket_bytes >> 20}

    def middle(key: str) -> float:
        return statistics.median(one[key] for one in received)

    seconds = statistics.median([max(one[0] for one in together) for together in zip(*pushed, strict=True)])
    cpu = statistics.median(
        sum(one[1] for one in together) + engine["all_cpu"]
        for together, engine in zip(zip(*pushed, strict=True), received, strict=True)
    )
    floor, floor_cpu = middle("floor"), middle("floor_cpu")
    ok = _speed("receiving, clock", floor, middle("seconds"), RECEIVING, not use_cpu, **facts)
    ok &= _speed("receiving, cpu", floor_cpu, middle("cpu"), RECEIVING, use_cpu, **facts)
    _line("packing, clock", **facts, seconds=middle("pack"), floor=floor, ratio=floor / middle("pack"))
    _line("packing, cpu", **facts, seconds=middle("pack_cpu"), floor=floor_cpu, ratio=floor_cpu / middle("pack_cpu"))
    ok &= _speed("end to end, clock", floor, seconds, END_TO_END, not use_cpu, **facts)
    ok &= _speed("end to end, cpu", floor_cpu, cpu, END_TO_END, use_cpu, **facts)
    limit = 2 * bucket_bytes + SPARE
    for side, peak in peaks.items():
        ok &= _line(f"memory, {side}", peak <= limit, **facts, peak_mib=peak >> 20, limit_mib=limit >> 20)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmark of weight transfer")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds: under a minute")
    parser.add_argument("--cpu", action="store_true", help="the targets are of processor time, not of the clock")
    parser.add_argument("--bucket-mib", type=int, default=16)
    options = parser.parse_args()
    bucket_bytes, ok = options.bucket_mib << 20, True
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        home = Path(folder)
        layers, vocab = (4, 50_000) if options.quick else (16, 151_936)
        size = run_distributed(make_model, 1, str(home / "model"), layers, vocab)[0]
        _line("model", gib=size / 2**30)
        server = session_nursery("engine")
        server.wait_ready()
        address, key = f"unix:{home}/engine.sock", secrets.token_hex(32)
        settings = {
            "report": str(home / "report"), "address": address, "key": key, "model_path": str(home / "model"),
            "dtype": "bfloat16", "max_model_len": 512, "kv_cache_bytes": 2**28, "max_num_seqs": 8,
            "prefix_cache": True, "threads": 1,
        }  # fmt: skip
        os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
        child = server.start("engine", "weight_transfer:serve_measured", settings, log_path=home / "engine.log")
        try:
            client = EngineClient.connect(address, key, deadline_s=300)
            for ranks in (1, 2):
                ok &= _case(home, (address, key), ranks, bucket_bytes, 3 if options.quick else 5, options.cpu)
            client.close()
        except BaseException:
            print(child.last_words(60), file=sys.stderr)
            raise
        finally:
            child.kill()
            child.wait(30)
            shutil.rmtree(home / "model")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

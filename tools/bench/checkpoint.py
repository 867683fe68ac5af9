#!/usr/bin/env python
"""What saving and loading a training checkpoint costs, against plain writes and reads of the same bytes, same folder.

Prints one JSON line per case; the exit status is 1 when a target is missed. The model's weights are 1 GiB in bfloat16
(with --quick 0.1), made on the spot; with master weights and moments a checkpoint has seven times that, and a rank
needs about 17 times it, gradients and snapshot included: what the machine lacks is said before anything is made.
Rounds of all cases alternate in one process; the medians count.

write      the peer: every byte of a checkpoint from the same tensors, into one file, with fsync
blocked    an asynchronous save: how long training waits, to the peer's time
total      the same save: until it is whole on the disk, to the peer's time; the disk is read once more, to hash it
waiting    a synchronous save, to the peer's time
memory     the same asynchronous save: memory beyond what training holds, to the checkpoint's bytes
training   steps per second while a save is written, to those before it (a stand-in: products of matrices, one thread);
           for information: it is a core's worth of work beside another
load       weights and optimizer state into a model, to a plain read of the same files into fresh memory; neither has
           them in the page cache
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _measure import Report

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.memory import Peak

TARGETS = {"blocked": 0.35, "total": 2.5, "waiting": 2.5, "memory": 1.1, "load": 2.0}
"""Ratios that may not be exceeded."""
_NEEDED = 17
"""Bytes of memory for each byte of bfloat16 weights: 1 of them, 2 of gradients, 6 of the optimizer, 7 of the snapshot
and some to spare."""
_BLOCK = 32 << 20


def _student(folder: str) -> Any:
    """In training: after an update that left no moment zero."""
    import torch

    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.config.schema import Adam
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import Student

    groups = Groups(tp=1, dp=1)
    groups.seed(0)
    student = Student(build_decoder(read_spec(folder), groups=groups, options=BuildOptions(torch.bfloat16)))
    student.start_optimizer(Adam(lr=1e-3))
    student.zero_grad()
    for number, parameter in enumerate(student.decoder.parameters()):
        parameter.main_grad.fill_(1e-3 * (number % 7 + 1))  # type: ignore[attr-defined]
    student.update()
    return student


def _tensors(student: Any) -> list[Any]:
    """All that a checkpoint has of this model, where training has it."""
    found = [parameter.data for parameter in student.decoder.parameters()]
    for each in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for group in each.optimizer.param_groups:
            for parameter in group["params"]:
                found += [parameter.data, *each.optimizer.state[parameter].values()]
    return found


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write(tensors: list[Any], path: Path) -> None:
    import torch

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for tensor in tensors:
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        while rest:
            rest = rest[os.write(file, rest[:_BLOCK]) :]
    os.fsync(file)
    os.close(file)


def _read(paths: list[Path]) -> None:
    import torch

    for path in paths:
        fresh, done = torch.empty(path.stat().st_size, dtype=torch.uint8), 0
        into, file = memoryview(fresh.numpy()), os.open(path, os.O_RDONLY)
        while done < len(into):
            done += os.preadv(file, [into[done : done + _BLOCK]], done)
        os.close(file)


def _forget(paths: list[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


class _Steps:
    """Training goes on in a thread of its own: products of matrices, which need no interpreter."""

    def __init__(self) -> None:
        self._done, self._stop, self._goes_on = 0, threading.Event(), threading.Event()
        self._goes_on.set()
        self._since = (0, time.perf_counter())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import torch

        a = torch.randn(512, 512)
        while not self._stop.is_set():
            self._goes_on.wait()
            a = torch.tanh(a @ a)
            self._done += 1

    def rate(self) -> float:
        """Steps a second since the last call."""
        (before, start), self._since = self._since, (self._done, time.perf_counter())
        return (self._since[0] - before) / (self._since[1] - start)

    def wait_for(self, work: Callable[[], Any]) -> None:
        """As training does, which is what takes the snapshot."""
        self._goes_on.clear()
        try:
            work()
        finally:
            self._goes_on.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def measure(rank: int, world: int, folder: str, home: str, rounds: int) -> dict[str, Any]:
    import torch

    from megatron_dgrpo.checkpoint.manifest import Manifest, contents
    from megatron_dgrpo.checkpoint.training import Saver, load_training

    torch.set_num_threads(1)
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, it is this process that goes
    student, found = _student(folder), {name: list[float]() for name in ("write", *TARGETS, "training", "read")}
    size = 0
    savers = {how: Saver(student.decoder, Path(home, how), folder, keep_last=1, asynchronous=how == "asynchronous")
              for how in ("synchronous", "asynchronous")}  # fmt: skip

    def save(how: str, step: int) -> Any:
        savers[how].save(student.optimizer, {"step": step}, Manifest(0, step, {}, {}))

    def saved(how: str) -> Any:
        done = savers[how].wait()
        assert done is not None and not done.failure, done
        return done

    for step in range(1, rounds + 1):
        plain, tensors = Path(home, "plain"), _tensors(student)
        found["write"].append(_timed(lambda: _write(tensors, plain)))  # noqa: B023
        size = plain.stat().st_size
        plain.unlink()
        os.sync()
        found["waiting"].append(_timed(lambda: save("synchronous", step)))  # noqa: B023
        saved("synchronous")
        shutil.rmtree(Path(home, "synchronous"))
        os.sync()
        steps = _Steps()
        time.sleep(1.0)
        before = steps.rate()
        with Peak() as peak:
            steps.wait_for(lambda: save("asynchronous", step))  # noqa: B023
            steps.rate()
            done = saved("asynchronous")
        found["training"].append(steps.rate() / before)
        steps.stop()
        found["blocked"].append(done.blocked_s)
        found["total"].append(done.total_s)
        found["memory"].append(float(peak.bytes))
        files = contents(done.target)
        _forget(files)
        found["load"].append(_timed(lambda: load_training(student.decoder, student.optimizer, done.target)))  # noqa: B023
        _forget(files)
        found["read"].append(_timed(lambda: _read(files)))  # noqa: B023
        shutil.rmtree(Path(home, "asynchronous"))
        os.sync()
    return {name: statistics.median(values) for name, values in found.items()} | {"bytes": size}


def _model(folder: Path, gib: float) -> None:
    """Its config alone: a Qwen3 with untied heads and so many GiB of weights in bfloat16."""
    vocab = 151_936 if gib >= 0.7 else 8_192
    layers = max(1, round((gib * 2**29 - 2 * vocab * 1024) / 15.73e6))
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": layers, "hidden_size": 1024,
        "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": vocab, "tie_word_embeddings": False, "rope_theta": 1e6, "dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))


def _check(home: Path, gib: float) -> None:
    available = next(int(line.split()[1]) / 2**20 for line in open("/proc/meminfo") if line.startswith("MemAvailable:"))
    free = shutil.disk_usage(home).free / 2**30
    for what, has, needs in (("memory", available, _NEEDED * gib), ("room in --home", free, 8 * gib)):
        if has < needs:
            sys.exit(f"{gib:g} GiB of weights need {needs:.1f} GiB of {what}, {has:.1f} GiB are free: lower --gib")


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmark of training checkpoints")
    parser.add_argument("--quick", action="store_true", help="0.1 GiB of weights, one round: under a minute")
    parser.add_argument("--gib", type=float, help="GiB of weights in bfloat16 (1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, help="where to write, on the disk to measure (a temporary folder)")
    given = parser.parse_args()
    gib, rounds = given.gib or (0.1 if given.quick else 1.0), 1 if given.quick else given.rounds
    report = Report()
    with tempfile.TemporaryDirectory(dir=given.home, prefix="checkpoint-") as folder:
        home = Path(folder)
        _check(home, gib)
        _model(home / "model", gib)
        found = run_distributed(measure, 1, str(home / "model"), folder, rounds, timeout_s=1800)[0]
    size = found["bytes"] / 2**30
    report.line("write", gib=size, weights_gib=gib, seconds=found["write"], gib_per_s=size / found["write"])
    for name in ("blocked", "total", "waiting"):
        report.line(name, seconds=found[name], ratio=found[name] / found["write"], target=TARGETS[name])
    report.line("memory", gib=found["memory"] / 2**30, ratio=found["memory"] / found["bytes"], target=TARGETS["memory"])
    report.line("training", ratio=found["training"])
    ratio = found["load"] / found["read"]
    report.line("load", seconds=found["load"], peer_seconds=found["read"], ratio=ratio, target=TARGETS["load"])
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())

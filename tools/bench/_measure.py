"""What the benchmark scripts share: cases in processes of their own, peak memory, one JSON line per case.

A script calls itself once per case and round. Memory is the most that the measured part held beyond what was there
when it began: resident set size on CPU, the allocator's figure on CUDA. Time on CPU is the processor time of one
thread, which a busy machine does not stretch as it does a clock's.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def measured(device: str, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds and bytes of one call."""
    base = _reset_memory(device)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    return {"seconds": seconds, "bytes": max(0, _peak_memory(device) - base)}


def _reset_memory(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    return _status("VmRSS")


def _peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def limit_memory(num_bytes: int) -> None:
    """Allocations beyond this fail instead of bringing the machine down."""
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def in_fresh_process(
    arguments: Iterable[str], *, threads: int, return_memory: bool = False, timeout_s: float = 3600
) -> dict[str, Any]:
    """The calling script again, with these arguments; it prints one JSON object on its last line.

    With `return_memory` the C library gives what is freed back to the system at once, so that the resident set says
    what is in use; that costs time.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if return_memory:
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments], env=env, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode == 0:
        with suppress(json.JSONDecodeError, IndexError):
            return json.loads(done.stdout.strip().splitlines()[-1])
    error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"error": error}


class Report:
    """Prints the lines; `exit_status` is 1 when a target was missed."""

    def __init__(self) -> None:
        self.exit_status = 0

    def line(
        self, name: str, *, ratio: float | None = None, target: float | None = None, at_most: bool = True, **values: Any
    ) -> None:
        """`ratio` is compared with `target` where there are both; without a ratio the target counts as missed."""
        ok = target is None or (ratio is not None and (ratio <= target if at_most else ratio >= target))
        row: dict[str, Any] = {"name": name, **values}
        if ratio is not None or target is not None:
            row["ratio"] = ratio
        if target is not None:
            row |= {"target": target, "ok": ok}
        print(json.dumps({key: _short(value) for key, value in row.items()}), flush=True)
        if not ok:
            self.exit_status = 1


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value

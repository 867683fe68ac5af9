"""Runs inside the processes that `testing.distributed` starts: find the test's function, run it, leave its result.

Arguments and results are pickled: both sides are the same test. Nothing outside of testing reads them. Megatron-Core
replaces torch's loader of pickled storages by one of its own, so a tensor pickled in a rank would make the receiver
import Megatron-Core (seconds, and outside of the CPU platform); storages are therefore pickled in a way of our own.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def load(file: str, module: str, qualname: str) -> Any:
    """A function of a test file, which belongs to no package: the file is imported by its path, under its own name."""
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None
    loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    function: Any = loaded
    for part in qualname.split("."):
        function = getattr(function, part)
    return function


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, (torch.TypedStorage, torch.UntypedStorage)):
            return NotImplemented
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return storage_from_bytes, (buffer.getvalue(),)


def storage_from_bytes(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)


def dumps(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(content)
    return buffer.getvalue()


def leave(path: Path, content: Any) -> None:
    """Write a pickle so that whoever sees the file sees all of it."""
    aside = path.with_suffix(".new")
    aside.write_bytes(dumps(content))
    os.replace(aside, path)


def main(folder: str, file: str, module: str, qualname: str, sys_path: list[str], rank: int, timeout_s: float) -> None:
    """Rank -1 is a process on its own; others get the default gloo group first."""
    here = Path(folder)
    try:
        sys.path[:] = sys_path
        function = load(file, module, qualname)
        args = pickle.loads((here / "args").read_bytes())
        if rank >= 0:
            from megatron_dgrpo.launch.rendezvous import init_process_group

            world_size = int(os.environ["WORLD_SIZE"])
            init_process_group(here, rank=rank, world_size=world_size, backend=_backend(), timeout_s=timeout_s + 30)
            args = (rank, world_size, *args)
        leave(here / f"result_{rank}", function(*args))
    except BaseException as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            error.__traceback__ = error.__traceback__.tb_next  # the frame here says nothing about the test
        trace = "".join(traceback.format_exception(error))
        leave(here / f"failure_{rank}", (time.monotonic(), type(error).__name__, trace))
        raise SystemExit(1) from None
    if rank == 0:  # it hosts the store, which others may still need
        while not all(_done(here, other) for other in range(world_size)):
            time.sleep(0.005)


def _done(here: Path, rank: int) -> bool:
    return (here / f"result_{rank}").exists() or (here / f"failure_{rank}").exists()


def _backend() -> str:
    """gloo for tensors on the CPU, always; NCCL beside it where there is a GPU to have tensors on."""
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"

"""The processes of an engine that is cut over several ranks: how they start, how they end, how they are asked.

One rank is computed in the host's own process. More are vLLM's workers, one process each, and these differ from what
vLLM does by itself:

- On CPU they are forked from the host, which has all imports: vLLM would start an interpreter for each, 20 s of imports
  on a free core. A fork is safe only while the host has run no parallel region, since an OpenMP pool does not survive
  it: the host computes nothing then, and keeps to one thread for good.
- Forked ones ask the kernel to be killed when the host dies, in whatever way it does. A worker of vLLM's own notices a
  closed pipe, and only where it reads it: one that computes, or waits for another worker, goes on.
- What they share in /dev/shm loses its name as soon as all have it: it goes with the last of them, even if they are
  killed. vLLM removes it only at an orderly end.
- A call answers with what went wrong instead of raising. When several workers raise, vLLM's executor reads the first
  answer and leaves the others in their queues, where they are taken for answers to the next call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import traceback
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from megatron_dgrpo.errors import DGRPOError, TransferError

_PR_SET_PDEATHSIG = 1
_THREADS_ENV = "OMP_NUM_THREADS"
_SHARED = re.compile(r" /dev/shm/vllm_dist_\S*cpushm_\d+$")


class HostExecutor(MultiprocExecutor):
    """vLLM's workers as processes of an engine host."""

    def _init_executor(self) -> None:
        if current_platform.is_cpu():
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # vLLM's CPU platform has set it to spawn
            threads = int(os.environ[_THREADS_ENV])
            torch.set_num_threads(1)
            os.register_at_fork(after_in_child=lambda: _become_worker(os.getppid(), threads))
        super()._init_executor()
        if current_platform.is_cpu():
            for worker in self.workers:
                _take_names_away(worker.proc.pid)


def _take_names_away(pid: int) -> None:
    with open(f"/proc/{pid}/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if _SHARED.search(line)}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another worker has it, too
            os.unlink(path)


def die_with(parent: int) -> None:
    """End this process when its parent does; at once, if that has happened already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def _become_worker(parent: int, threads: int) -> None:
    die_with(parent)
    torch.set_num_threads(threads)


def ask(llm: Any, method: str, **arguments: Any) -> None:
    """Call a method of every worker; raises one error with what all of them said."""
    answers = llm.collective_rpc(attempt, args=(method, arguments))
    said = dict.fromkeys(answer for answer in answers if answer)
    if said:
        raise TransferError("\n".join(said))


def attempt(worker: Any, method: str, arguments: dict[str, Any]) -> str:
    """In a worker: what went wrong, or nothing."""
    try:
        getattr(worker, method)(**arguments)
    except DGRPOError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return f"{type(error).__name__}: {error}"
    return ""

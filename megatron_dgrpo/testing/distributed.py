"""Run a function on several ranks over gloo, or in a process of its own, in milliseconds.

Ranks are forked from a server that imported torch, Megatron-Core and transformers once for the whole test session;
engine tests have a second one that imported vLLM. Each is started by the first test that needs it and ends with the
session.

A failure names every rank that failed, the first cause first, with its traceback; a time-out shows where each rank
hung.
The process that calls needs no torch, unless the results do.
"""

from __future__ import annotations

import atexit
import inspect
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_dgrpo.errors import DGRPOError
from megatron_dgrpo.launch import nursery
from megatron_dgrpo.launch.nursery import Child, Nursery
from megatron_dgrpo.testing.rank import dumps

Preload = Literal["trainer", "engine"]
_OWN = (  # what most ranks of tests import: together it takes as long as a small test does
    "megatron_dgrpo.algorithms.build",
    "megatron_dgrpo.checkpoint.megatron",
    "megatron_dgrpo.teacher.frozen",
    "megatron_dgrpo.train.checks",
    "megatron_dgrpo.train.worker",
)
_PRELOAD: dict[str, tuple[str, ...]] = {
    "trainer": (*nursery.TRAINER_PRELOAD, "transformers.models.qwen3.modeling_qwen3", *_OWN, "pytest"),
    "engine": (*nursery.ENGINE_PRELOAD, "pytest"),
}
_SETTLE_S = 1.5
"""After a rank failed, how long the others may take to fail of it."""

_nurseries: dict[str, tuple[Nursery, tempfile.TemporaryDirectory[str]]] = {}


class RankError(DGRPOError, AssertionError):
    """A rank of a test failed, died or hung."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120, env: Mapping[str, str] | None = None
) -> list[Any]:
    """`fn(rank, world_size, *args)` on each rank of a gloo group; returns their results, by rank.

    `fn` is a function of a module's top level; arguments and results are pickled. In a rank, `RANK`, `WORLD_SIZE` and
    `LOCAL_RANK` are set, torch has one thread and its default process group. `env` adds to the environment; it cannot
    change what the server's imports have already read. Other ranks are ended soon after one fails.
    """
    world = {r: {"RANK": str(r), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(r)} for r in range(world_size)}
    return _run(fn, world, args, "trainer", timeout_s, env or {})


def run_forked(
    fn: Callable[..., Any],
    *args: Any,
    preload: Preload = "trainer",
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
) -> Any:
    """`fn(*args)` in one process, forked from a server that imported Megatron-Core ("trainer") or vLLM ("engine")."""
    return _run(fn, {-1: {}}, args, preload, timeout_s, env or {})[0]


def session_nursery(preload: Preload = "trainer") -> Nursery:
    """The session's server with these imports, started when first asked for."""
    if preload in _nurseries and not _nurseries[preload][0].alive:
        _close(preload)
    if preload not in _nurseries:
        folder = tempfile.TemporaryDirectory(prefix="dgrpo-test-")
        home = Path(folder.name)
        env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | (nursery.ENGINE_ENV if preload == "engine" else {})
        server = Nursery(_PRELOAD[preload], log_path=home / "server.log", env=env, private_dir=home)
        _nurseries[preload] = server, folder
        if len(_nurseries) == 1:
            atexit.register(_close_all)
    return _nurseries[preload][0]


def _close(preload: str) -> None:
    server, folder = _nurseries.pop(preload)
    server.close()
    folder.cleanup()


def _close_all() -> None:
    for preload in list(_nurseries):
        _close(preload)


def _run(
    fn: Callable[..., Any],
    world: dict[int, dict[str, str]],
    args: tuple[Any, ...],
    preload: Preload,
    timeout_s: float,
    env: Mapping[str, str],
) -> list[Any]:
    if "<" in fn.__qualname__:
        raise RankError(f"{fn.__qualname__} is not a function of a module's top level: a rank cannot find it.")
    server = session_nursery(preload)
    server.wait_ready()
    _, home = _nurseries[preload]
    with tempfile.TemporaryDirectory(dir=home.name) as folder:
        here = Path(folder)
        (here / "args").write_bytes(dumps(args))
        call = {
            "folder": folder,
            "file": inspect.getfile(fn),
            "module": fn.__module__ if fn.__module__ != "__main__" else "__dgrpo_main__",
            "qualname": fn.__qualname__,
            "sys_path": list(sys.path),
            "timeout_s": timeout_s,
        }
        children: list[Child] = []
        try:
            for rank, its_env in world.items():
                name, both = f"rank{rank}" if rank >= 0 else "forked", {"OMP_NUM_THREADS": "1", **its_env, **env}
                log = here / f"{name}.log"
                target = "megatron_dgrpo.testing.rank:main"
                children.append(server.start(name, target, {**call, "rank": rank}, env=both, log_path=log))
            hung = _wait(server, children, timeout_s)
        finally:
            for child in children:
                child.kill()
        for child in children:
            child.wait(10)
        _raise_failures(here, list(world), children, hung, timeout_s)
        _print_logs(children)
        return [pickle.loads((here / f"result_{rank}").read_bytes()) for rank in world]


def _wait(server: Nursery, children: list[Child], timeout_s: float) -> list[Child]:
    """Until all have ended, or one has failed and the rest had their moment, or the time is up. Returns who hung."""
    deadline, failed = time.monotonic() + timeout_s, False
    while running := [child for child in children if child.returncode is None]:
        if not failed and any(child.returncode for child in children):
            failed, deadline = True, min(deadline, time.monotonic() + _SETTLE_S)
        left = deadline - time.monotonic()
        if left <= 0:
            for child in running:
                child.kill(signal.SIGUSR1)  # the rank writes every thread's stack into its log
            server.drain(0.2)
            time.sleep(0.3)
            return running
        server.drain(left)
    return []


def _raise_failures(here: Path, ranks: list[int], children: list[Child], hung: list[Child], timeout_s: float) -> None:
    causes: list[tuple[bool, float, str]] = []  # a death by a signal comes first: others only notice it
    for rank, child in zip(ranks, children, strict=True):
        failure = here / f"failure_{rank}"
        if child in hung:
            continue
        if failure.exists():
            when, kind, trace = pickle.loads(failure.read_bytes())
            causes.append((True, when, f"---- {child.name} raised {kind} ----\n{trace}"))
        elif child.returncode != 0:
            status = child.returncode or 0
            text = f"---- {child.name} {nursery.in_words(status)} ----\n{child.last_words(40)}"
            causes.append((status >= 0, child.died_at or 0.0, text))
    if not causes and not hung:
        return
    first_line = f"{len(causes)} of {len(children)} ranks failed" if causes else f"No end within {timeout_s:g} s"
    if hung:
        first_line += f"; {', '.join(child.name for child in hung)} still ran and had to be ended"
    stacks = [f"---- {child.name} was here ----\n{child.last_words(80)}" for child in hung]
    raise RankError("\n".join([first_line + ".", *[text for _, _, text in sorted(causes)], *stacks]))


def _print_logs(children: list[Child]) -> None:
    """What ranks printed becomes part of the test's own output."""
    for child in children:
        if words := child.last_words(200).strip():
            print(f"[{child.name}]\n{words}")

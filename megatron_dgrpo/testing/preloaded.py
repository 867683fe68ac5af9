"""Whole runs from imports made once: `dgrpo train` in processes that are forked, supervisor and servers included.

A run's supervisor starts two servers that import torch and vLLM, in 5 to 20 s. Here these servers, and the supervisor
itself, are forked from the session's servers (`distributed.session_nursery`), which have done so: a run begins in the
time that its ranks and its engine take. Everything else is what `dgrpo train` does. A supervisor that is killed takes
its servers with it as ever, since they wait at the other end of its sockets.

    this process --- server of the session (torch) -+- supervisor --socket--+
                  |                                 +- trainer server <-----+
                  +- server of the session (vLLM) --- engine server <-------+
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch import nursery, nursery_server
from megatron_dgrpo.launch.nursery import Child
from megatron_dgrpo.testing.distributed import Preload, session_nursery

_KINDS: tuple[Preload, ...] = ("trainer", "engine")


class PreloadedRun:
    """One start of a run: `dgrpo train CONFIG OVERRIDES`, in an environment with `env` added to it."""

    def __init__(self, config: str | Path, *overrides: str, env: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dgrpo-run-"))
        self.words = ""
        """What the supervisor said, once all has ended."""
        env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder), **(env or {})}
        self.servers = {
            kind: self._start(kind, f"server-{kind}", "become_server", {"kind": kind}, env) for kind in _KINDS
        }
        told = {
            "config": str(config),
            "overrides": overrides,
            "servers": {kind: child.pid for kind, child in self.servers.items()},
        }
        self.supervisor = self._start("trainer", "supervisor", "supervise", told, env)

    def _start(self, kind: Preload, name: str, target: str, args: dict[str, Any], env: Mapping[str, str]) -> Child:
        args = args | {"folder": str(self.folder)}
        log = self.folder / f"{name}.log"
        return session_nursery(kind).start(name, f"{__name__}:{target}", args, env=env, log_path=log)

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left: the supervisor, and the servers, which end what it had started."""
        for kind in _KINDS:
            session_nursery(kind).drain()
        if self.supervisor.returncode is None:
            return False
        for kind, server in self.servers.items():
            if not self._taken(kind).exists():  # the supervisor had no use for it, or did not come so far
                server.kill()
        return all(server.returncode is not None for server in self.servers.values())

    def wait(self, timeout_s: float = 200) -> int:
        """The supervisor's exit status, as `subprocess` has it, when nothing of the run is left."""
        deadline = time.monotonic() + timeout_s
        try:
            while not self.ended:
                if time.monotonic() > deadline:
                    raise LaunchError(f"the run had not ended after {timeout_s:g} s: {self.supervisor.last_words()}")
                select.select([session_nursery(kind) for kind in _KINDS], [], [], 0.05)
        finally:
            self.close()
        assert self.supervisor.returncode is not None
        return self.supervisor.returncode

    def close(self) -> None:
        """Whatever is left ends."""
        everybody = [self.supervisor, *self.servers.values()]
        for child in everybody:
            child.kill()
        for child in everybody:
            with contextlib.suppress(LaunchError):
                child.wait(40)
        self.words = self.words or self.supervisor.last_words(60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _taken(self, kind: str) -> Path:
        return self.folder / f"{kind}.taken"


# ---- in the forked processes ----


def become_server(*, folder: str, kind: str) -> None:
    """A server of a run whose imports are made, once the supervisor gives it its end of a socket, and its log."""
    os.setsid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/{kind}.sock")
        listener.listen(1)
        connection, _ = listener.accept()
    with connection:
        log, (descriptor,), _, _ = socket.recv_fds(connection, 4096, 1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(output, number)
    nursery_server.be_server(socket.socket(fileno=descriptor))


def supervise(*, folder: str, config: str, overrides: list[str], servers: dict[str, int]) -> None:
    """`dgrpo train`, with servers that are there."""
    from megatron_dgrpo import cli

    def start(preload: Sequence[str], theirs: socket.socket, log_path: Path, env: Mapping[str, str]) -> Any:
        kind = "engine" if tuple(preload) == nursery.ENGINE_PRELOAD else "trainer"
        (Path(folder) / f"{kind}.taken").touch()
        return _Server(servers[kind], f"{folder}/{kind}.sock", theirs, log_path)

    nursery.start_server = start
    raise SystemExit(cli.main(["train", config, *overrides]))


class _Server:
    """A server's process as `nursery.Nursery` asks for it, though it is no child of the supervisor."""

    def __init__(self, pid: int, address: str, theirs: socket.socket, log_path: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._process = os.pidfd_open(pid)
        deadline = time.monotonic() + 60
        with socket.socket(socket.AF_UNIX) as connection:
            while True:
                try:
                    connection.connect(address)
                    break
                except OSError:  # it has not come so far
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
            socket.send_fds(connection, [str(log_path).encode()], [theirs.fileno()])

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._process], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("server", timeout or 0)
            self.returncode = 0  # another process is told with what it ended
        return self.returncode

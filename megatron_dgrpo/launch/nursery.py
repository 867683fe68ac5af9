"""The owner's side of a nursery: start processes from imports made once, watch them, end them. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch import nursery_server

TRAINER_PRELOAD = ("megatron_dgrpo.parallel.preload",)
_CPU_WORKER = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner")
ENGINE_PRELOAD = (
    "vllm",
    "vllm.v1.engine.llm_engine",
    *(() if os.path.exists("/dev/nvidiactl") else _CPU_WORKER),
    "vllm.model_executor.models.qwen3",
)
ENGINE_ENV = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}  # vLLM reads them when it is imported
_ENGINE_WARNINGS = (  # vLLM's on every start: each is about something that is meant to be as it is
    "The global random seed is set to",
    "This model does not officially support disabling chunked prefill",
    "max_num_batched_tokens .* exceeds max_num_seqs",
    "Enforce eager set",
    "Inductor compilation was disabled by user settings",
    "Triton is not installed",
    "Reset SSM cache type",
    "Model Runner V2 requires Triton",
    r"\S+ is not found in LD_PRELOAD",
    "Using None for EOS token id",
)
NOISE = re.compile(
    r"\[Gloo\] Rank |Extension modules: |  File .*nursery_server\.py\", line "
    r"|Loading \S+ checkpoint shards: |\[W\d+ .*NUMA binding: "
    r"|.*triton_utils/dispatcher\.py:\d+: FutureWarning: |  if hasattr\(value, \"__dict__\"\):$"
    r"|  wrapper = lookup\(vars\(value\)\.get\(\"kernel\"\)\)$"
    rf"|(\(\w+ pid=\d+\) )?WARNING [^\[]*\[\S+\] ({'|'.join(_ENGINE_WARNINGS)})"
)


def in_words(returncode: int) -> str:
    """What an exit status says: "exited with status 3", "was killed by SIGSEGV (Segmentation fault)"."""
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name} ({signal.strsignal(-returncode)})"
    except ValueError:
        return f"was killed by signal {-returncode}"


def last_lines(path: str | Path, lines: int = 20) -> str:
    """The end of a log, without what libraries print at every start and stacks share."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in text.splitlines() if not NOISE.match(line)][-lines:]).strip("\n")


class Child:
    """A process that a nursery forked. `returncode` is None while it runs, then as with subprocess (-9: killed)."""

    def __init__(self, nursery: Nursery, name: str, pid: int, log_path: Path) -> None:
        self.name, self.pid, self.log_path = name, pid, log_path
        self.returncode: int | None = None
        self.died_at: float | None = None
        """time.monotonic() of the death, comparable between the processes of a machine."""
        self._nursery = nursery

    def poll(self) -> int | None:
        self._nursery.drain()
        return self.returncode

    def wait(self, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while self.returncode is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LaunchError(f"{self.name} (pid {self.pid}) still runs after {timeout_s:g} s.")
            self._nursery.drain(left)
        return self.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            self._nursery.send(signal=int(number), pid=self.pid)

    def last_words(self, lines: int = 20) -> str:
        return last_lines(self.log_path, lines)


def start_server(
    preload: Sequence[str], theirs: socket.socket, log_path: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """The process of a server, which is going to be told to import `preload`. `theirs` is its end of the socket."""
    with open(log_path, "ab") as log:
        return subprocess.Popen(
            [sys.executable, nursery_server.__file__, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal is the owner's to deal with
        )


class Nursery:
    """A server process with its imports, and the children it forked.

    Making one returns at once; the imports go on meanwhile. `private_dir` and `/dev/shm/<shm_prefix>*` are removed by
    the server when the owner closes the nursery or dies.
    """

    def __init__(
        self,
        preload: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        private_dir: Path | None = None,
        shm_prefix: str | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.log_path = log_path
        self.start_timeout_s = start_timeout_s
        self.ready_after_s: float | None = None
        """How long the imports took; None until they are done."""
        self.running: dict[int, Child] = {}
        self._replies: list[dict[str, Any]] = []
        self._buffer = b""
        self._asked_at: float | None = None
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.server = start_server(preload, theirs, log_path, env or {})
        self.send(
            sys_path=[path or os.getcwd() for path in sys.path],
            preload=list(preload),
            private_dir=str(private_dir) if private_dir else None,
            shm_prefix=shm_prefix,
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when there is something to `drain`."""
        return self._socket.fileno()

    @property
    def alive(self) -> bool:
        """Whether the server is there, as far as `drain` has seen."""
        return self._socket.fileno() >= 0

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait for the imports."""
        timeout_s = self.start_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        while self.ready_after_s is None:
            self.ready_after_s = self._reply(deadline, f"its imports took more than {timeout_s:g} s")["ready"]

    def start(
        self, name: str, target: str, args: Mapping[str, Any], *, env: Mapping[str, str] | None = None, log_path: Path
    ) -> Child:
        """Fork a process that runs `target` ("module:function") with keyword arguments that JSON can hold.

        The exit status is 0 when the target returns, 1 when it raises (the traceback is in the log), else that of its
        SystemExit. `atexit` handlers do not run.
        """
        self.wait_ready()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.send(name=name, target=target, args=dict(args), env=dict(env or {}), log_path=str(log_path))
        reply = self._reply(time.monotonic() + self.start_timeout_s, f"it did not fork {name}")
        if "failed" in reply:
            raise LaunchError(f"{name} could not be forked: {reply['failed']}.")
        return self._adopt(name, reply["started"], log_path)

    def _adopt(self, name: str, pid: int, log_path: Path) -> Child:
        child = self.running[pid] = Child(self, name, pid, log_path)
        early = [r for r in self._replies if r.get("exited") == pid]
        self._replies = [r for r in self._replies if r not in early]
        for reply in early:
            self._bury(reply)
        return child

    def drain(self, timeout_s: float = 0.0) -> None:
        """Take in what the server reports, waiting for something for at most `timeout_s`."""
        if self._socket.fileno() < 0:
            return
        while select.select([self._socket], [], [], max(0.0, timeout_s))[0]:
            timeout_s = 0.0
            try:
                data = self._socket.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                self._server_died()
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                reply = json.loads(line)
                if "pong" in reply:
                    self._asked_at = None
                elif reply.get("exited") in self.running:
                    self._bury(reply)
                else:
                    self._replies.append(reply)

    def ask(self) -> None:
        """Whether the server is there and not hung, unless it was asked already; `drain` takes the answer in."""
        if self.alive and self.ready_after_s is not None and self._asked_at is None:
            self._asked_at = time.monotonic()
            self.send(ping=True)

    @property
    def silent_s(self) -> float:
        """How long a question has waited for its answer; 0 where none does."""
        return time.monotonic() - self._asked_at if self.alive and self._asked_at is not None else 0.0

    def close(self, grace_s: float = 0.0, *, hangs: bool = False) -> None:
        """End every process: SIGTERM and `grace_s` where that is not 0, then SIGKILL, grandchildren included. A server
        that hangs does nothing of it: it waits for nobody, so that the numbers of its descendants are still theirs."""
        if grace_s > 0 and self.running:
            for child in list(self.running.values()):
                child.kill(signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while self.running and time.monotonic() < deadline:
                self.drain(deadline - time.monotonic())
        self._socket.close()
        if hangs:
            for pid in nursery_server.descendants(self.server.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            self.server.wait(0.0 if hangs else 40.0)
        except subprocess.TimeoutExpired:
            self._kill_group()
        for child in list(self.running.values()):
            self._bury({"exited": child.pid, "status": -signal.SIGKILL, "time": time.monotonic()})

    def send(self, **message: Any) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.drain()  # reads what it still had to say, and notices its end

    def _reply(self, deadline: float, problem: str) -> dict[str, Any]:
        while True:
            for index, reply in enumerate(self._replies):
                if "exited" not in reply and "broken" not in reply:
                    return self._replies.pop(index)
            if self._socket.fileno() < 0:
                raise LaunchError(self.obituary())
            left = deadline - time.monotonic()
            if left <= 0:
                raise LaunchError(f"The processes' server (pid {self.server.pid}) does not answer: {problem}.")
            self.drain(left)

    def obituary(self) -> str:
        """Why the server is gone."""
        for reply in self._replies:
            if "broken" in reply:
                return (
                    f"The processes' server could not import {reply['broken']}; install what it needs "
                    f"(`dgrpo doctor` lists it).\n{reply['traceback']}"
                )
        status = self.server.returncode
        return (
            f"The processes' server (pid {self.server.pid}) {in_words(status) if status is not None else 'is gone'}. "
            f"Its last words:\n{last_lines(self.log_path)}"
        )

    def _server_died(self) -> None:
        """Its children die with it, by the kernel's hand; what they started is in its process group."""
        self._socket.close()
        self._kill_group()
        for child in list(self.running.values()):
            self._bury({"exited": child.pid, "status": -signal.SIGKILL, "time": time.monotonic()})

    def _kill_group(self) -> None:
        if self.server.returncode is None:  # not waited for, so the number cannot be another's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()

    def _bury(self, reply: dict[str, Any]) -> None:
        child = self.running.pop(reply["exited"])
        child.returncode, child.died_at = reply["status"], reply["time"]

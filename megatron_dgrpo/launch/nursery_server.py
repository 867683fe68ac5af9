"""The server that forks processes from imports made once. It runs as a script of its own; nothing imports it.

Importing torch, Megatron-Core or vLLM costs 5 to 20 seconds and hundreds of megabytes. This server imports them once
and then forks: a child starts in milliseconds and shares those pages. What makes the fork safe is what the server does
*not* do: it starts no thread and enters no parallel region (an OpenMP pool does not survive a fork).

**Nothing outlives the owner.** The owner holds the other end of the control socket. When that end closes, in whatever
way the owner came to an end (SIGKILL included), the server reads end-of-file and clears up:

- It is the *subreaper* of its descendants: a grandchild whose parent dies becomes a child of the server, even one that
  left its process group. So "kill my children until I have none" reaches every descendant.
- Its children ask the kernel to be killed should the server itself die (PR_SET_PDEATHSIG); the owner then kills what is
  left of the server's process group.
- The run's private folder and shared-memory files are removed last, when nobody is left to make new ones: those named
  with the run's prefix, and those that libraries (NCCL, vLLM's workers) made in descendants under names of their own.

This holds only while no other process has a copy of the owner's end: that end is close-on-exec. The owner notices the
server's death in the same way, so a forked child closes its copy of the server's end before it does anything else.

**An orphan may have work to do**: multiprocessing's resource tracker removes the shared memory of a killed parent.
Orphans therefore get a moment before they are killed.

The protocol is a line of JSON for each message. First comes the owner's settings, then the server answers `ready` or
`broken`; after that the owner sends `start`, `signal` and `ping`, and the server `started`, `failed`, `exited` and
`pong`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import glob
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_ORPHAN_GRACE_S = 2.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the owner decides; it may be sent the same signal


def _prctl(option: int, value: Any) -> None:
    value = ctypes.c_ulong(value) if isinstance(value, int) else value
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`, the dead that nobody waited for among them."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as stat:
                if int(stat.read().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry))
    return found


def descendants(pid: int) -> list[int]:
    found, new = [], [pid]
    while new:
        new = [child for pid in new for child in _children_of(pid)]
        found += new
    return found


class Server:
    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.buffer = b""
        self.running: set[int] = set()
        self.orphan_deadline: float | None = None
        self.private_dir: str | None = None
        self.shm_prefix: str | None = None
        self.shared: set[str] = set()
        self.older = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set[str]()

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # an owner that is gone is noticed where the socket is read
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def read_line(self) -> dict[str, Any] | None:
        """The next message, waiting for it; None once the owner is gone."""
        while b"\n" not in self.buffer:
            data = self.control.recv(65536)
            if not data:
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    # ---- before the first fork ----

    def prepare(self) -> bool:
        """Import what the owner names. False where there is nothing more to do."""
        settings = self.read_line()
        if settings is None:
            return False
        sys.path[:] = settings["sys_path"]
        self.private_dir, self.shm_prefix = settings["private_dir"], settings["shm_prefix"]
        self._watch_owner_while_importing()
        start = time.monotonic()
        for name in settings["preload"]:
            try:
                importlib.import_module(name)
            except BaseException:
                self.send(broken=name, traceback=traceback.format_exc())
                return False
        fcntl.fcntl(self.control, fcntl.F_SETFL, fcntl.fcntl(self.control, fcntl.F_GETFL) & ~os.O_ASYNC)
        gc.collect()
        gc.freeze()  # a collection in a child would otherwise write to, and so copy, every shared page
        self.send(ready=round(time.monotonic() - start, 3), threads=len(os.listdir("/proc/self/task")))
        return True

    def _watch_owner_while_importing(self) -> None:
        """Imports can take 20 s; an owner that dies meanwhile ends the server at once."""

        def woken(number: int, frame: Any) -> None:
            with contextlib.suppress(BlockingIOError):
                if not self.control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    self.clear_up()
                    os._exit(0)

        signal.signal(signal.SIGIO, woken)
        fcntl.fcntl(self.control, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self.control, fcntl.F_SETFL, fcntl.fcntl(self.control, fcntl.F_GETFL) | os.O_ASYNC)
        woken(signal.SIGIO, None)

    # ---- the loop ----

    def serve(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.selector.register(self.control, selectors.EVENT_READ)
        self.selector.register(self.wake_read, selectors.EVENT_READ)
        while True:
            timeout = None if self.orphan_deadline is None else max(0.0, self.orphan_deadline - time.monotonic())
            ready = [key.fileobj for key, _ in self.selector.select(timeout)]
            if self.wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake_read, 4096)
                self.reap()
            if self.orphan_deadline is not None and time.monotonic() >= self.orphan_deadline:
                self.orphan_deadline = None
                self.kill_all(set(_children_of(os.getpid())) - self.running)
            if self.control in ready:
                while (message := self.read_line()) is not None:
                    self.handle(message)
                    if b"\n" not in self.buffer:
                        break
                if message is None:
                    return

    def handle(self, message: dict[str, Any]) -> None:
        if "ping" in message:
            self.send(pong=True)
            return
        if "signal" in message:
            if message["pid"] in self.running:  # not yet waited for, so the number is still this child's
                os.kill(message["pid"], message["signal"])
            return
        try:
            pid = os.fork()
        except OSError as error:
            self.send(failed=str(error))
            return
        if pid == 0:
            self._become(message)
        self.running.add(pid)
        self.send(started=pid)

    def reap(self) -> None:
        """Wait for every dead child, and report those that were started on request."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.running:
                self.running.discard(pid)
                self.send(exited=pid, status=os.waitstatus_to_exitcode(status), time=time.monotonic())
                if self.orphan_deadline is None and set(_children_of(os.getpid())) - self.running:
                    self.note_shared_memory()  # while somebody still maps what the dead process made
                    self.orphan_deadline = time.monotonic() + _ORPHAN_GRACE_S

    # ---- the end ----

    @staticmethod
    def kill_all(pids: set[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def note_shared_memory(self) -> None:
        """Remember the shared-memory files that descendants map and that were made in this server's time."""
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
                for line in maps:
                    path = line.rstrip("\n").partition("/dev/shm/")[2]
                    if path and not path.startswith("dgrpo-") and path.partition("/")[0] not in self.older:
                        if os.path.exists(f"/dev/shm/{path}"):  # another run's are that run's to remove
                            self.shared.add(f"/dev/shm/{path}")

    def clear_up(self) -> None:
        """Kill every descendant, then remove what the run left in memory and in its private folder."""
        start, me = time.monotonic(), os.getpid()
        self.note_shared_memory()
        self.kill_all(self.running)
        while time.monotonic() < start + 30:  # a process in an uninterruptible wait must not hold the server for ever
            self.reap()
            left = set(_children_of(me))
            if not left:
                break
            if time.monotonic() > start + _ORPHAN_GRACE_S / 2:
                self.kill_all(left)
            time.sleep(0.01)
        named = glob.glob(f"/dev/shm/{glob.escape(self.shm_prefix)}*") if self.shm_prefix else []
        for path in {*named, *self.shared}:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self.private_dir:
            shutil.rmtree(self.private_dir, ignore_errors=True)

    # ---- the child ----

    def _become(self, request: dict[str, Any]) -> NoReturn:
        """In the forked process: cut every tie to the server, run the target, exit. Never returns."""
        server, status = os.getppid(), 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*_IGNORED, signal.SIGCHLD, signal.SIGIO):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a word from the supervisor, for who listens to it
            self.selector.close()
            self.control.close()
            os.close(self.wake_read)
            os.close(self.wake_write)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server:  # the server died before the kernel was told
                os._exit(1)
            _redirect(request["log_path"])
            _prctl(_PR_SET_NAME, ctypes.create_string_buffer(request["name"].encode()[:15]))
            os.environ.update(request["env"])
            status = _run(request["target"], request["args"])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException as error:
            if any(kind.__name__ == "DGRPOError" for kind in type(error).__mro__):
                print(f"{type(error).__name__}: {error}", file=sys.stderr)  # it names its cause and its remedy
            else:
                traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(status & 0xFF)


def _redirect(log_path: str) -> None:
    """Output goes to the log, line by line. Loggers made by the imports hold the same streams, so theirs does, too."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    faulthandler.enable(file=2)  # a crash in native code leaves its Python stack as last words
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # and so does a process that hangs, when asked


def _run(target: str, args: dict[str, Any]) -> int:
    torch = sys.modules.get("torch")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if torch is not None and threads.isdigit():
        torch.set_num_threads(int(threads))  # OpenMP read the variable when the server imported it
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(**args)
    return 0


def main() -> None:
    be_server(socket.socket(fileno=int(sys.argv[1])))


def be_server(control: socket.socket) -> NoReturn:
    """Serve the owner at the other end, until it is gone."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    control.set_inheritable(False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    server = Server(control)
    status = 1
    try:
        if server.prepare():
            server.serve()
            status = 0
    finally:
        server.clear_up()
    raise SystemExit(status)


if __name__ == "__main__":
    main()

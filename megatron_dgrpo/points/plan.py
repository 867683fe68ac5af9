"""A plan of faults: which point, at which of the times that a process reaches it, in which process, and what happens.

The environment variable DGRPO_FAULTS holds the path of a JSON file. Nothing of this project sets it but testing/faults,
which describes what the file holds; no other input leads here. The file is read when a process first reaches a point:

    {"record": FOLDER or null, "faults": [{"point", "moment", "nth", "role", "act", "seconds", "mark"}, ...]}

`moment` is `before` an operation, `half` way through what it writes or sends, or `after` it. `role` is the name that
the supervisor gave the process (`rank0`, `engine-rollout`), or `supervisor` for any other. A fault strikes once in a
run, whatever processes are started again: who strikes first makes the file `mark`. With `record`, each process appends
the name of every point that it reaches to a file of its own.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgrpo.points.table import POINTS

VARIABLE = "DGRPO_FAULTS"
_NAMED = re.compile(r"rank\d+$|engine-|checks$|trial")
BEFORE, HALF, AFTER = "before", "half", "after"


@dataclass(frozen=True)
class Fault:
    point: str
    act: str
    """kill, stop, sleep, no_space, error, truncate, corrupt, close."""
    moment: str = BEFORE
    nth: int = 1
    role: str = "*"
    seconds: float = 0.0
    """Of sleep."""
    mark: str = ""


Target = int | socket.socket | None
"""What an operation works on: a descriptor, a socket."""


class Plan:
    """Of one process."""

    def __init__(self, content: dict[str, Any]) -> None:
        comm = Path("/proc/self/comm").read_text().strip()
        self.role = comm if _NAMED.match(comm) else "supervisor"
        self._faults = [Fault(**fault) for fault in content["faults"]]
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._record = -1
        if folder := content.get("record"):
            path = Path(folder) / f"{self.role}-{os.getpid()}.points"
            self._record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def arrive(self, point: str) -> list[Fault]:
        """A process is at a point: what strikes this time, at whatever moment."""
        assert point in POINTS, point
        with self._lock:
            self._counts[point] += 1
            count = self._counts[point]
        if self._record >= 0:
            os.write(self._record, point.encode() + b"\n")
        return [f for f in self._faults if f.point == point and f.nth == count and f.role in ("*", self.role)]

    def around(self, point: str, operation: Callable[[], Any], target: Target = None) -> Any:
        """An operation that has no middle."""
        faults = self.arrive(point)
        self._strike(faults, BEFORE, target, 0)
        result = operation()
        self._strike(faults, AFTER, target, 0)
        return result

    def through(self, point: str, put: Callable[[memoryview], None], data: memoryview, target: Target) -> None:
        """Bytes that are put somewhere, which may stop in the middle."""
        faults = self.arrive(point)
        self._strike(faults, BEFORE, target, 0)
        if any(fault.moment == HALF for fault in faults):
            middle = len(data) // 2
            put(data[:middle])
            self._strike(faults, HALF, target, middle)
            put(data[middle:])
        else:
            put(data)
        self._strike(faults, AFTER, target, len(data))

    def send(self, point: str, connection: socket.socket, data: memoryview) -> int:
        faults = self.arrive(point)
        self._strike(faults, BEFORE, connection, 0)
        half = any(fault.moment == HALF for fault in faults)
        done = connection.send(data[: len(data) // 2] if half else data)
        self._strike(faults, HALF, connection, done)
        self._strike(faults, AFTER, connection, done)
        return done

    def remove_tree(self, point: str, folder: Path, ignore_errors: bool) -> None:
        faults = self.arrive(point)
        self._strike(faults, BEFORE, None, 0)
        if any(fault.moment == HALF for fault in faults):
            for path in sorted(path for path in folder.rglob("*") if path.is_file())[::2]:
                path.unlink()
            self._strike(faults, HALF, None, 0)
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        self._strike(faults, AFTER, None, 0)

    def _strike(self, faults: list[Fault], moment: str, target: Target, count: int) -> None:
        for fault in faults:
            if fault.moment == moment and _first(fault.mark):
                _act(fault, target, count)


def _first(mark: str) -> bool:
    if not mark:
        return True
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _act(fault: Fault, target: Target, count: int) -> None:
    """`count` bytes were the last that were put into the target."""
    match fault.act:
        case "kill" | "stop":
            os.kill(os.getpid(), signal.SIGKILL if fault.act == "kill" else signal.SIGSTOP)
        case "sleep":
            time.sleep(fault.seconds)
        case "no_space":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        case "close":
            assert isinstance(target, socket.socket), f"{fault.point} is no place of a connection"
            target.shutdown(socket.SHUT_RDWR)
        case "truncate" | "corrupt":
            assert isinstance(target, int), f"{fault.point} is no place of a file"
            _damage(target, count, cut=fault.act == "truncate")
        case _:
            raise AssertionError(fault.act)


def _damage(descriptor: int, count: int, *, cut: bool) -> None:
    """In the middle of the last `count` bytes of a file."""
    place = os.fstat(descriptor).st_size - (count + 1) // 2
    if cut:
        os.ftruncate(descriptor, place)
        return
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # without O_APPEND, which writes at the end whatever
    try:
        byte = os.pread(again, 1, place)
        os.pwrite(again, bytes([byte[0] ^ 1]), place)
    finally:
        os.close(again)


_UNREAD: Any = object()
_plan: Plan | None = _UNREAD


def current() -> Plan | None:
    """This process's plan; none, in production."""
    global _plan
    if _plan is _UNREAD:
        path = os.environ.get(VARIABLE)
        _plan = Plan(json.loads(Path(path).read_text(encoding="utf-8"))) if path else None
    return _plan


def _forget() -> None:
    """In a forked process, which may have been given an environment of its own."""
    global _plan
    _plan = _UNREAD


os.register_at_fork(after_in_child=_forget)

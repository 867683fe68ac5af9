"""The operations at points. Each takes the point's name first and does what the system call of its name does."""

from __future__ import annotations

import io
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dgrpo.points.plan import Target, current

Bytes = bytes | bytearray | memoryview


def reached(point: str) -> None:
    """A place where something else happens than an operation of this module: bytes are copied, a step begins."""
    if (plan := current()) is not None:
        plan.around(point, lambda: None)


# ---- files ----


def open_file(point: str, path: str | Path, flags: int, mode: int = 0o644) -> int:
    """A descriptor of a file that is made, or is going to be written."""
    return _around(point, lambda: os.open(path, flags, mode))


def write(point: str, descriptor: int, data: Bytes) -> None:
    """All of it. An error may leave a part of it."""

    def put(part: memoryview) -> None:
        while part:
            part = part[os.write(descriptor, part) :]

    _through(point, put, data, descriptor)


def write_at(point: str, descriptor: int, data: Bytes, offset: int) -> None:
    """All of it, from an offset on."""
    place = offset

    def put(part: memoryview) -> None:
        nonlocal place
        while part:
            done = os.pwrite(descriptor, part, place)
            part, place = part[done:], place + done

    _through(point, put, data, descriptor)


def write_file(point: str, path: str | Path, content: Bytes, *, synced: bool = True) -> None:
    """A file with these contents and no others. `after` is when they are on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:

        def put(part: memoryview) -> None:
            while part:
                part = part[os.write(descriptor, part) :]

        _through(point, put, content, descriptor)
        if synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stream(point: str, sync_point: str, path: str | Path) -> io.BufferedWriter:
    """A new file for a library that writes into a stream; synced when it is closed."""
    return _Synced(_Raw(point, sync_point, path))


class _Raw(io.RawIOBase):
    def __init__(self, point: str, sync_point: str, path: str | Path) -> None:
        self._point, self.sync_point = point, sync_point
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        part = memoryview(data).cast("B")
        write(self._point, self._descriptor, part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


class _Synced(io.BufferedWriter):
    def __init__(self, raw: _Raw) -> None:
        super().__init__(raw)
        self._sync_point = raw.sync_point

    def close(self) -> None:
        if not self.closed:
            try:
                self.flush()
                sync(self._sync_point, self.fileno())
            finally:
                super().close()


def sync(point: str, descriptor: int) -> None:
    """What was written survives the machine."""
    _around(point, lambda: os.fsync(descriptor), descriptor)


def sync_folder(point: str, folder: str | Path) -> None:
    """Names reach the disk with their folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(point, descriptor)
    finally:
        os.close(descriptor)


def cut(point: str, descriptor: int, size: int) -> None:
    """Shorten a file."""
    _around(point, lambda: os.ftruncate(descriptor, size), descriptor)


def rename(point: str, path: str | Path, target: str | Path) -> None:
    """In place of what may have that name."""
    _around(point, lambda: os.replace(path, target))


def remove(point: str, path: str | Path, *, missing_ok: bool = False) -> None:
    """A file, or a socket's name. `after` comes also where it was not there."""
    missing: FileNotFoundError | None = None

    def unlink() -> None:
        nonlocal missing
        try:
            os.unlink(path)
        except FileNotFoundError as error:
            missing = error

    _around(point, unlink)
    if missing is not None and not missing_ok:
        raise missing


def remove_tree(point: str, folder: str | Path, *, ignore_errors: bool = False) -> None:
    """A folder with all that is in it. `half` way, every other file is gone."""
    plan = current()
    if plan is None:
        shutil.rmtree(folder, ignore_errors=ignore_errors)
    else:
        plan.remove_tree(point, Path(folder), ignore_errors)


# ---- connections ----


def send(point: str, connection: socket.socket, data: Bytes) -> int:
    """What the socket takes at once; returns how much."""
    plan = current()
    if plan is None:
        return connection.send(data)
    return plan.send(point, connection, memoryview(data).cast("B"))


def send_all(point: str, connection: socket.socket, data: Bytes) -> None:
    _through(point, connection.sendall, data, connection)


def _around(point: str, operation: Callable[[], Any], target: Target = None) -> Any:
    plan = current()
    return operation() if plan is None else plan.around(point, operation, target)


def _through(point: str, put: Callable[[memoryview], None], data: Bytes, target: Target) -> None:
    plan, whole = current(), memoryview(data).cast("B")
    if plan is None:
        put(whole)
    else:
        plan.through(point, put, whole, target)

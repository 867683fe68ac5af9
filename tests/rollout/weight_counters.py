"""What a transfer of weights must not do, counted: files that are opened, bytes that processes read and write."""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from pathlib import Path

_IN_OPEN, _IN_CREATE, _IN_MODIFY = 0x20, 0x100, 0x2
_EVENT = struct.Struct("iIII")


class FolderEvents:
    """Counts how often files of a folder are opened, made or changed, by whatever process and in whatever language."""

    def __init__(self, folder: str | Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = _IN_OPEN | _IN_CREATE | _IN_MODIFY
        if self._descriptor < 0 or self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {folder}")

    def since_last(self) -> Counter[str]:
        """Events by the file's name, since the last call."""
        found: Counter[str] = Counter()
        try:
            while data := os.read(self._descriptor, 1 << 16):
                while data:
                    _, _, _, length = _EVENT.unpack_from(data)
                    name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode()
                    found[name] += 1
                    data = data[_EVENT.size + length :]
        except BlockingIOError:
            return found

    def close(self) -> None:
        os.close(self._descriptor)


def file_bytes(pid: int) -> int:
    """What a process has moved by read and write; what it maps, or sends over a socket, is not in it."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"]) + int(fields["wchar"])

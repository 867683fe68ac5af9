"""How much memory a part of a program takes of its own: anonymous and shared, without mapped files."""

from __future__ import annotations

import threading
from typing import Any


class Peak:
    """The most anonymous and own shared memory while it is open, above what there was before."""

    def __init__(self) -> None:
        self._base, self.bytes, self._stop = held(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, held() - self._base)


def held() -> int:
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) << 10 for line in status if line.startswith(("RssAnon:", "RssShmem:")))

"""Reads that fail for a while, or never come back: of a network file system, or of the hub.

What may pass (an error of input or output, a connection that is lost) is tried again after 1, 2, 4, ... seconds, as
often as the source allows; what stays (no such file, no permission) is an error at once. A read that hangs cannot be
ended from outside, so that each one is made in a thread of its own kind: who asked waits for its deadline, and then the
run ends with words instead of waiting for ever.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

from megatron_dgrpo.config.data import Source
from megatron_dgrpo.errors import DataError

FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_STAYS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_OF_NETWORKS = ("aiohttp", "httpcore", "httpx", "requests", "urllib3")
"""Libraries whose errors are those of a connection, and not all of them OSErrors."""


class EndedEarly(OSError):
    """A source gave fewer rows than before."""


class Patience:
    """Of one source. `num_retries` counts the reads that were tried again."""

    def __init__(self, source: Source) -> None:
        self._where, self._retries, self._timeout_s = source.where, source.retries, source.timeout_s
        self._reader: _Reader | None = None
        self.num_retries = 0

    def __call__[T](self, read: Callable[[], T], again: Callable[[], object] = lambda: None) -> T:
        """What `read` returns; `again` is called before every further try."""
        return self._tried(lambda: self._in_time(read), lambda: self._in_time(again))

    def without_deadline[T](self, read: Callable[[], T]) -> T:
        """Of a read that takes as long as there is much to read."""
        return self._tried(read, lambda: None)

    def _tried[T](self, read: Callable[[], T], again: Callable[[], object]) -> T:
        pause_s, begin = FIRST_PAUSE_S, read
        for left in range(self._retries, -1, -1):
            try:
                return begin()
            except Exception as error:
                words = _words(error)
                if isinstance(error, _STAYS):
                    raise DataError(f"{self._where} can't be read ({words}): correct the data's path") from error
                if not _may_pass(error):
                    raise
                if not left:
                    raise DataError(
                        f"{self._where} can't be read ({words}), tried {self._retries + 1} times: see to the file "
                        "system or the network, or raise retries"
                    ) from error
            self.num_retries += 1
            with contextlib.suppress(OSError):  # a log on a full disk
                print(f"{self._where} can't be read ({words}); it is tried again in {pause_s:g} s", flush=True)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

            def begin() -> T:
                again()
                return read()

        raise AssertionError("unreachable")

    def _in_time[T](self, read: Callable[[], T]) -> T:
        if self._reader is None:
            self._reader = _Reader()
        try:
            return self._reader.read(read, self._timeout_s)
        except Empty:
            self._reader = None  # it hangs, and goes with the process
            raise DataError(
                f"a read of {self._where} has hung for {self._timeout_s:g} s: see to the file system or the network, "
                "or raise timeout_s"
            ) from None


class _Reader:
    """A thread that reads."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._read: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._run, name="data", daemon=True).start()

    def read[T](self, read: Callable[[], T], timeout_s: float) -> T:
        self._asked.put(read)
        found, error = self._read.get(timeout=timeout_s)
        if error is not None:
            raise error
        return found

    def _run(self) -> None:
        while True:
            read = self._asked.get()
            try:
                self._read.put((read(), None))
            except BaseException as error:  # it belongs to who asked
                self._read.put((None, error))


def _may_pass(error: BaseException) -> bool:
    """Whether an error is of reading, or made of one."""
    return any(
        isinstance(one, OSError) or type(one).__module__.partition(".")[0] in _OF_NETWORKS for one in _chain(error)
    ) and not any(isinstance(one, _STAYS) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""What ranks of one machine tell rank 0 about each bucket, over Unix sockets, and what it tells them.

A question to the store costs as much as copying a megabyte, and asking again and again while one waits costs more than
all buckets together. A socket wakes who waits for it, and ends when the process at its other end does. The store is
left with what is rare: where the socket is, and why somebody failed.

    rank r -> rank 0    a line of JSON: [key, r] first, then one for each bucket that it has written
    rank 0 -> rank r    one byte for each bucket whose place may be written again, one more at the end

Bytes that a rank wrote to shared memory before it sent a line are seen by whoever has received it. A rank that fails
says why in the store before its sockets close, so that those who find them closed can repeat its words.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
from typing import Any

from megatron_dgrpo import points
from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout.board import Board
from megatron_dgrpo.rollout.wire import listen

_LOOK_S = 0.1
"""How often those who wait look for failures of ranks that they have no socket to."""
_CHUNK = 1 << 16


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class _Lines:
    """A socket and what has come of the line after the last whole one."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.lines: list[bytes] = []
        self._rest = b""

    def take_in(self) -> bool:
        """Read what is there; False at the end of the stream."""
        try:
            data = self.socket.recv(_CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *whole, self._rest = (self._rest + data).split(b"\n")
        self.lines += whole
        return bool(data)


class Links:
    """Of one push; every rank has one. Waiting ends with the board's deadline."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._listener: socket.socket | None = None
        self._path = self._key = ""
        self._strangers: list[_Lines] = []
        self._ranks: dict[int, _Lines] = {}  # of rank 0: the others
        self._to_first: socket.socket | None = None
        self._num_freed = 0

    # ---- rank 0 ----

    def open(self, path: str) -> list[str]:
        """Listen; returns what the others `join` with."""
        self._path, self._key = path, secrets.token_hex(16)
        self._listener = listen(f"unix:{path}")
        return [self._path, self._key]

    def collect(self, what: str) -> list[Any]:
        """The next line of every other rank, in their order."""
        others = range(1, self._board.num_ranks)
        while not all(rank in self._ranks and self._ranks[rank].lines for rank in others):
            self._wait_for_lines(what)
        if self._listener is not None:  # all have joined
            self._stop_listening()
        return [json.loads(self._ranks[rank].lines.pop(0)) for rank in others]

    def free(self) -> None:
        """Tell the others that one more bucket's place may be written again."""
        for lines in self._ranks.values():
            with contextlib.suppress(OSError):  # whoever has gone is found when its next line is awaited
                points.send("links.free", lines.socket, b".")

    def _wait_for_lines(self, what: str) -> None:
        poll = select.poll()
        awaited = {lines.socket.fileno(): lines for lines in [*self._ranks.values(), *self._strangers]}
        for number in [*awaited, *([self._listener.fileno()] if self._listener else [])]:
            poll.register(number, select.POLLIN)
        ready = poll.poll(1000 * min(_LOOK_S, self._board.left()))
        for number, _ in ready:
            if number not in awaited:
                self._accept()
            elif not awaited[number].take_in():
                self._board.look(what)
                gone = [rank for rank, lines in self._ranks.items() if lines is awaited[number]]
                if gone:
                    raise TransferError(f"rank {gone[0]} has gone; rank 0 waited for {what}")
                self._strangers.remove(awaited[number])
        for stranger in [s for s in self._strangers if s.lines]:
            self._strangers.remove(stranger)
            said = stranger.lines.pop(0)
            for rank in range(1, self._board.num_ranks):
                if hmac.compare_digest(said, _line([self._key, rank])):
                    self._ranks[rank] = stranger
        if not ready:
            self._board.look(what)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            self._strangers.append(_Lines(sock))

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            points.remove("links.unlink", self._path, missing_ok=True)

    # ---- the others ----

    def join(self, path: str, key: str) -> None:
        self._to_first = socket.socket(socket.AF_UNIX)
        with self._first_rank("it to take a connection"):
            self._to_first.connect(path)
        self.send([key, self._board.rank])

    def send(self, line: Any) -> None:
        assert self._to_first is not None
        with self._first_rank("it to take what was written"):
            self._to_first.settimeout(self._board.left())
            points.send_all("links.line", self._to_first, _line(line) + b"\n")

    def await_freed(self, count: int, what: str) -> None:
        """Wait until rank 0 has called `free` so often."""
        assert self._to_first is not None
        while self._num_freed < count:
            with self._first_rank(what):
                self._to_first.settimeout(min(_LOOK_S, self._board.left()))
                try:
                    if not (data := self._to_first.recv(_CHUNK)):
                        raise ConnectionResetError
                    self._num_freed += len(data)
                except TimeoutError:
                    self._board.look(what)

    @contextlib.contextmanager
    def _first_rank(self, what: str) -> Any:
        try:
            yield
        except OSError:
            self._board.look(what)
            raise TransferError(f"rank 0 has gone; rank {self._board.rank} waited for {what}") from None

    def close(self) -> None:
        self._stop_listening()
        for lines in [*self._ranks.values(), *self._strangers]:
            lines.socket.close()
        if self._to_first is not None:
            self._to_first.close()

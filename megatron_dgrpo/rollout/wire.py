"""An authenticated byte stream of messages over a Unix or TCP socket. Imports neither torch nor vLLM.

Both sides hold the run's key. At connection each proves it to the other without showing it:

    server -> client   hello, 32 random bytes S
    client -> server   hello, 32 random bytes C, HMAC(key, "client" S C)
    server -> client   1, HMAC(key, "server" S C)       or 0, zeros: the key was wrong

These three have fixed lengths, so nobody without the key can make either side allocate or parse anything else. The
frames that follow are authenticated by keys derived from S, C and the direction, with the frame's number: none can be
changed, repeated, reordered, dropped in the middle or reflected. The stream is not encrypted; a link that others can
listen to needs that from elsewhere.

`Channel` is the protocol without a socket, fed with bytes and asked for bytes: one implementation for the client, which
waits with deadlines (`Connection`), and for the host, which must not wait at all (`server`).
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import select
import socket
import time
from hashlib import blake2b
from typing import Any

from megatron_dgrpo import points
from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout import codec
from megatron_dgrpo.rollout.codec import decode, encode, register

__all__ = [
    "Channel",
    "Connection",
    "ConnectionLost",
    "connect",
    "decode",
    "encode",
    "listen",
    "parse_address",
    "register",
]

_HELLO = b"dgrpo/1\n"
_NONCE = 32
_PROOF = 32
_SERVER_HELLO = len(_HELLO) + _NONCE
_CLIENT_HELLO = len(_HELLO) + _NONCE + _PROOF
_VERDICT = 1 + _PROOF
_CHUNK = 1 << 18


class ConnectionLost(RolloutError):
    """The other side has gone, or does not answer: what it was asked can be asked of another one."""


def keep_alive(sock: socket.socket) -> None:
    """Of a TCP connection: small messages go at once, and a machine that has gone is noticed within two minutes."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000),
    ):
        sock.setsockopt(level, option, value)


def parse_address(text: str) -> tuple[socket.AddressFamily, Any]:
    """`unix:/path` or `tcp:host:port` as what `socket` wants."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest.startswith("/"):
        if len(os.fsencode(rest)) > 107:
            raise RolloutError(
                f"the socket path {rest!r} is longer than the 107 bytes that Unix allows: choose a shorter one"
            )
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit() and int(port) < 2**16:
        host = host.strip("[]")
        return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))
    raise RolloutError(f"{text!r} is not an address: write unix:/absolute/path or tcp:host:port")


def listen(address: str) -> socket.socket:
    """A non-blocking listening socket, on a path of this user's or on one named interface."""
    family, target = parse_address(address)
    if family != socket.AF_UNIX:
        try:
            wildcard = ipaddress.ip_address(socket.gethostbyname(target[0]) if family == socket.AF_INET else target[0])
        except (OSError, ValueError) as error:
            raise RolloutError(
                f"cannot listen at {address}: {target[0]!r} is no interface of this machine ({error})"
            ) from None
        if wildcard.is_unspecified:
            raise RolloutError(f"{address} would listen on every interface: name the one to listen on")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            mask = os.umask(0o177)
            try:
                listener.bind(target)
            finally:
                os.umask(mask)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise RolloutError(
            f"cannot listen at {address} ({error}): is another engine there, or a file left over?"
        ) from None
    listener.setblocking(False)
    return listener


class Channel:
    """One end of the protocol. Bytes that came go into `receive`; bytes to send wait in `outgoing`."""

    def __init__(self, key: str, *, server: bool, peer: str) -> None:
        if len(key) < 16:
            raise RolloutError("the run's key has fewer than 16 characters: make one with secrets.token_hex(32)")
        self.peer = peer
        self.server = server
        self.ready = False
        self.outgoing = bytearray()
        self._key = blake2b(key.encode(), digest_size=32).digest()
        self._nonce = os.urandom(_NONCE)
        self._incoming = bytearray()
        self._both = b""
        self._keys = (b"", b"")
        self._sent = self._received = 0
        if server:
            self.outgoing += _HELLO + self._nonce

    def send(self, message: Any) -> None:
        assert self.ready
        self.outgoing += encode(message, key=self._keys[0], sequence=self._sent)
        self._sent += 1

    def receive(self, data: bytes) -> list[Any]:
        """The messages that are whole now."""
        self._incoming += data
        if not self.ready and not self._shake_hands():
            return []
        messages = []
        while len(self._incoming) >= codec.HEADER.size:
            length = codec.frame_length(self._incoming)
            if len(self._incoming) < length:
                break
            frame = bytes(self._incoming[:length])
            del self._incoming[:length]
            messages.append(decode(frame, key=self._keys[1], sequence=self._received))
            self._received += 1
        return messages

    # ---- the handshake ----

    def _proof(self, who: bytes) -> bytes:
        return hmac.digest(self._key, who + self._both, "sha256")

    def _take(self, count: int) -> bytes | None:
        if len(self._incoming) < count:
            return None
        data = bytes(self._incoming[:count])
        del self._incoming[:count]
        return data

    def _shake_hands(self) -> bool:
        if self.server:
            return self._answer_client()
        if not self._both:
            start = self._take(_SERVER_HELLO)
            if start is None:
                return False
            self._check_hello(start)
            self._both = start[len(_HELLO) :] + self._nonce
            self.outgoing += _HELLO + self._nonce + self._proof(b"client")
        verdict = self._take(_VERDICT)
        if verdict is None:
            return False
        if verdict[:1] != b"\1":
            raise RolloutError(f"{self.peer} refused this run's key: the engine was started with another one")
        if not hmac.compare_digest(verdict[1:], self._proof(b"server")):
            raise RolloutError(f"{self.peer} does not know this run's key: something else listens there")
        self._start(b"client", b"server")
        return True

    def _answer_client(self) -> bool:
        answer = self._take(_CLIENT_HELLO)
        if answer is None:
            return False
        self._check_hello(answer)
        self._both = self._nonce + answer[len(_HELLO) : -_PROOF]
        if not hmac.compare_digest(answer[-_PROOF:], self._proof(b"client")):
            self.outgoing += bytes(_VERDICT)
            raise RolloutError(f"{self.peer} came with a wrong key and was refused")
        self.outgoing += b"\1" + self._proof(b"server")
        self._start(b"server", b"client")
        return True

    def _check_hello(self, start: bytes) -> None:
        if not start.startswith(_HELLO):
            raise RolloutError(
                f"{self.peer} speaks another protocol or version of it: it began with {start[: len(_HELLO)]!r}"
            )

    def _start(self, mine: bytes, theirs: bytes) -> None:
        self._keys = self._derive(mine), self._derive(theirs)
        self.ready = True

    def _derive(self, sender: bytes) -> bytes:
        return hmac.digest(self._key, b"frames from the " + sender + self._both, "sha256")


class Connection:
    """A channel over a socket, for a client that waits: every wait has a deadline and says what it was for."""

    def __init__(self, sock: socket.socket, key: str, *, peer: str) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._channel = Channel(key, server=False, peer=peer)
        self._messages: list[Any] = []
        self.peer = peer

    def shake_hands(self, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while not self._channel.ready:
            self._exchange(deadline, f"the handshake with {self.peer}")

    def send(self, message: Any, *, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        self._channel.send(message)
        try:
            while self._channel.outgoing:
                self._exchange(deadline, f"{self.peer} to take a {type(message).__name__}")
        except RolloutError as error:
            self.close()  # half a message may be on its way: nothing can follow it
            raise ConnectionLost(str(error)) from None

    def receive(self, *, deadline_s: float, awaiting: str) -> Any:
        """The next message; `awaiting` names what it should be, for the error of a deadline that passes."""
        deadline = time.monotonic() + deadline_s
        while not self._messages:
            self._exchange(deadline, f"{awaiting} from {self.peer}")
        return self._messages.pop(0)

    def take(self) -> list[Any]:
        """The messages that have come, without waiting. An end of the stream is an error, after all before it."""
        try:
            while not self._messages:
                data = self._socket.recv(_CHUNK)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "end of the stream")
                self._messages += self._channel.receive(data)
        except BlockingIOError:
            pass
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer} closed the connection ({error.strerror})") from None
        except RolloutError:
            self.close()
            raise
        messages, self._messages = self._messages, []
        return messages

    def fileno(self) -> int:
        """Readable when there is something to `take`; -1 when the connection is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def _exchange(self, deadline: float, what: str) -> None:
        """Move bytes in either direction, once."""
        if self._socket.fileno() < 0:
            raise ConnectionLost(f"the connection to {self.peer} is closed; waited for {what}")
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._channel.outgoing else 0))
        left = deadline - time.monotonic()
        ready = poll.poll(max(0.0, left) * 1000)
        if not ready:
            if left > 0:
                return
            raise RolloutError(f"the deadline passed; waited for {what}")
        try:
            if ready[0][1] & select.POLLOUT:
                part = memoryview(self._channel.outgoing)[:_CHUNK].tobytes()
                del self._channel.outgoing[: points.send("wire.send", self._socket, part)]
            if ready[0][1] & ~select.POLLOUT:
                data = self._socket.recv(_CHUNK)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "end of the stream")
                self._messages += self._channel.receive(data)
        except BlockingIOError:
            return
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer} closed the connection ({error.strerror}); waited for {what}") from None
        except RolloutError:
            self.close()
            raise


def connect(address: str, key: str, *, deadline_s: float, peer: str) -> Connection:
    """Connect, trying again while nothing listens yet: a host listens once it can serve."""
    family, target = parse_address(address)
    deadline = time.monotonic() + deadline_s
    while True:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.connect(target)
            if family != socket.AF_UNIX:
                keep_alive(sock)
            break
        except OSError as error:
            sock.close()
            if time.monotonic() + 0.05 > deadline:
                raise RolloutError(
                    f"{peer} could not be reached at {address} within {deadline_s:g} s ({error})"
                ) from None
            time.sleep(0.05)
    connection = Connection(sock, key, peer=peer)
    try:
        connection.shake_hands(max(0.001, deadline - time.monotonic()))
    except RolloutError:
        connection.close()
        raise
    return connection

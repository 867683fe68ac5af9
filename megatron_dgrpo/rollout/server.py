"""The host's end of the protocol: many clients, one thread, no waiting. It knows bytes and messages, and no engine.

`poll` takes in what came and gives out what waits, and returns at once when told to; the caller steps an engine in
between. A client that stalls costs nothing but its own memory, up to a limit; one that does not prove the key in time
is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import sys
import time
from typing import Any

from megatron_dgrpo import points
from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout.wire import Channel, keep_alive, listen, parse_address

_CHUNK = 1 << 18
_HANDSHAKE_S = 20.0
_MAX_STRANGERS = 64
"""Connections that have not proved the key, at a time."""
_MAX_UNREAD_BYTES = 2**30
"""What may wait for a client that does not read."""


class Peer:
    """A client as the host sees it."""

    def __init__(self, sock: socket.socket, key: str, name: str) -> None:
        self.socket = sock
        self.channel = Channel(key, server=True, peer=name)
        self.name = name
        self.since = time.monotonic()
        self.attached = False
        self.owner = False

    @property
    def gone(self) -> bool:
        return self.socket.fileno() < 0


class Server:
    """Listens from the moment it is made."""

    def __init__(self, address: str, key: str) -> None:
        self.address = address
        self._key = key
        self._selector = selectors.DefaultSelector()
        self._listener = listen(address)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[Peer] = []
        self._num_accepted = 0

    def poll(self, timeout_s: float | None) -> list[tuple[Peer, Any]]:
        """Messages with their senders; None instead of a message says that a client has gone."""
        events: list[tuple[Peer, Any]] = []
        for peer in self._peers:
            if peer.gone:  # dropped between two polls: nothing to wait for
                timeout_s = 0.0
            else:
                waiting = selectors.EVENT_WRITE if peer.channel.outgoing else 0
                self._selector.modify(peer.socket, selectors.EVENT_READ | waiting, peer)
        strangers = [peer for peer in self._peers if not peer.channel.ready and not peer.gone]
        if strangers:  # wake up in time to drop them
            timeout_s = _HANDSHAKE_S if timeout_s is None else min(timeout_s, _HANDSHAKE_S)
        for key, ready in self._selector.select(timeout_s):
            if key.data is None:
                self._accept(len(strangers))
                continue
            sender: Peer = key.data
            if ready & selectors.EVENT_WRITE:
                self._write(sender)
            if ready & selectors.EVENT_READ and not sender.gone:
                events += [(sender, message) for message in self._read(sender)]
        for peer in strangers:
            if not peer.gone and not peer.channel.ready and time.monotonic() - peer.since > _HANDSHAKE_S:
                self.drop(peer, f"did not prove the key within {_HANDSHAKE_S:g} s")
        for gone in [peer for peer in self._peers if peer.gone]:
            self._peers.remove(gone)
            events.append((gone, None))
        return events

    def send(self, peer: Peer, message: Any) -> None:
        """Queue a message, and send what goes at once. A client that has gone gets nothing."""
        if peer.gone:
            return
        peer.channel.send(message)
        self._write(peer)
        if len(peer.channel.outgoing) > _MAX_UNREAD_BYTES:
            self.drop(peer, f"left {len(peer.channel.outgoing)} bytes unread")

    def flush(self, deadline_s: float) -> None:
        """Give clients the time to take what waits for them."""
        deadline = time.monotonic() + deadline_s
        while any(not p.gone and p.channel.outgoing for p in self._peers) and time.monotonic() < deadline:
            for peer in self._peers:
                self._write(peer)
            time.sleep(0.002)

    def close(self) -> None:
        for peer in self._peers:
            peer.socket.close()
        self._selector.close()
        self._listener.close()
        family, path = parse_address(self.address)
        if family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                points.remove("server.unlink", path)

    def drop(self, peer: Peer, why: str) -> None:
        """End a connection, and say so in the log."""
        with contextlib.suppress(OSError):  # of a full disk
            print(f"{peer.name} was dropped: {why}", file=sys.stderr, flush=True)
        self._hang_up(peer)

    def _hang_up(self, peer: Peer) -> None:
        if not peer.gone:
            self._selector.unregister(peer.socket)
            peer.socket.close()

    def _accept(self, num_strangers: int) -> None:
        try:
            sock, source = self._listener.accept()
        except OSError as error:  # the client was gone again, or there are no file descriptors left for now
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.01)
            return
        if num_strangers >= _MAX_STRANGERS:
            sock.close()
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            keep_alive(sock)
        self._num_accepted += 1
        peer = Peer(sock, self._key, f"client {self._num_accepted}{f' at {source[0]}' if source else ''}")
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        self._write(peer)

    def _write(self, peer: Peer) -> None:
        outgoing = peer.channel.outgoing
        try:
            while outgoing and not peer.gone:
                with memoryview(outgoing) as view:
                    count = points.send("server.send", peer.socket, view[:_CHUNK])
                del outgoing[:count]
        except BlockingIOError:
            return
        except OSError:
            self._hang_up(peer)

    def _read(self, peer: Peer) -> list[Any]:
        try:
            data = peer.socket.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._hang_up(peer)
            return []
        try:
            messages = peer.channel.receive(data)
        except RolloutError as error:
            self._write(peer)  # a refusal is an answer, too
            self.drop(peer, str(error))
            return []
        self._write(peer)
        return messages

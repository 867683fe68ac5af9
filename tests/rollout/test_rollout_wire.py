"""The handshake, the channel, and both ends of the socket, without an engine."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout import messages as m
from megatron_dgrpo.rollout.server import Server
from megatron_dgrpo.rollout.wire import Channel, connect, listen, parse_address

KEY = "k" * 32


# ---- the channel ----


def pair(server_key: str = KEY, client_key: str = KEY) -> tuple[Channel, Channel]:
    return Channel(server_key, server=True, peer="client"), Channel(client_key, server=False, peer="server")


def carry(source: Channel, target: Channel, step: int = 1 << 20) -> list[object]:
    """Move what waits, in pieces."""
    got: list[object] = []
    while source.outgoing:
        piece = bytes(source.outgoing[:step])
        del source.outgoing[:step]
        got += target.receive(piece)
    return got


def met(**keys: str) -> tuple[Channel, Channel]:
    server, client = pair(**keys)
    carry(server, client)
    carry(client, server)
    carry(server, client)
    return server, client


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_channel_carries_messages_in_pieces_of_any_size(step):
    server, client = met()
    assert server.ready and client.ready
    for call in range(3):
        client.send(m.Describe(call))
        server.send(m.Done(call))
    assert carry(client, server, step) == [m.Describe(c) for c in range(3)]
    assert carry(server, client, step) == [m.Done(c) for c in range(3)]


def test_a_wrong_key_is_a_clear_error_on_both_sides():
    server, client = pair(client_key="x" * 32)
    carry(server, client)
    with pytest.raises(RolloutError, match="client came with a wrong key"):
        carry(client, server)
    with pytest.raises(RolloutError, match="server refused this run's key"):
        carry(server, client)
    assert not server.ready and not client.ready


def test_a_server_without_the_key_is_noticed():
    server, client = pair()
    carry(server, client)
    with pytest.raises(RolloutError, match="does not know this run's key"):
        client.receive(b"\1" + bytes(32))


def test_a_short_key_is_refused():
    with pytest.raises(RolloutError, match="fewer than 16"):
        Channel("short", server=True, peer="x")


def test_frames_cannot_be_repeated_left_out_reordered_or_reflected():
    for manipulate in (lambda f: [f[0], f[0]], lambda f: [f[1]], lambda f: [f[1], f[0]]):
        server, client = met()
        frames = []
        for call in (1, 2):
            client.send(m.Describe(call))
            frames.append(bytes(client.outgoing))
            client.outgoing.clear()
        with pytest.raises(RolloutError, match="MAC"):
            for one in manipulate(frames):
                server.receive(one)
    server, client = met()
    client.send(m.Describe(1))
    with pytest.raises(RolloutError, match="MAC"):
        client.receive(bytes(client.outgoing))


def test_frames_of_another_connection_are_refused():
    (_, first), (server, _) = met(), met()
    first.send(m.Describe(1))
    with pytest.raises(RolloutError, match="MAC"):
        server.receive(bytes(first.outgoing))


def test_random_bytes_never_do_more_than_raise():
    rng = random.Random(0)
    for trial in range(300):
        noise = rng.randbytes(rng.randrange(1, 400))
        server, client = pair() if trial % 2 else met()
        for channel in (server, client):
            try:
                assert channel.receive(noise) == []
            except RolloutError:
                pass


def test_a_huge_frame_is_refused_before_it_is_read():
    server, client = met()
    with pytest.raises(RolloutError, match="limit"):
        server.receive(struct.pack("<4sIQ", b"dgM1", 10, 2**50))


# ---- sockets ----


class Running:
    """A server that answers Describe with Done, in a thread."""

    def __init__(self, address: str, key: str = KEY) -> None:
        self.server = Server(address, key)
        self.gone = 0
        self.stop = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.stop:
            for peer, message in self.server.poll(0.02):
                if message is None:
                    self.gone += 1
                elif isinstance(message, m.Describe):
                    self.server.send(peer, m.Done(message.call))
        self.server.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop = True
        self.thread.join()


@pytest.fixture
def address():
    with tempfile.TemporaryDirectory() as folder:  # shorter than pytest's, and than the limit of such addresses
        yield f"unix:{folder}/engine"
        assert os.listdir(folder) == []


def test_requests_and_answers_over_a_socket(address):
    with Running(address):
        assert os.stat(address[5:]).st_mode & 0o777 == 0o600
        connections = [connect(address, KEY, deadline_s=60, peer="engine") for _ in range(3)]
        for call, connection in enumerate(connections):
            connection.send(m.Describe(call), deadline_s=60)
        for call, connection in enumerate(connections):
            assert connection.receive(deadline_s=60, awaiting="an answer") == m.Done(call)
            connection.close()


def test_over_tcp_on_a_named_interface():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Running(f"tcp:127.0.0.1:{port}"):
        connection = connect(f"tcp:127.0.0.1:{port}", KEY, deadline_s=60, peer="engine")
        connection.send(m.Describe(1), deadline_s=60)
        assert connection.receive(deadline_s=60, awaiting="an answer") == m.Done(1)
        connection.close()


def test_a_wrong_key_over_a_socket(address, capfd):
    with Running(address):
        start = time.monotonic()
        with pytest.raises(RolloutError, match="engine refused this run's key"):
            connect(address, "wrong" * 8, deadline_s=60, peer="engine")
        assert time.monotonic() - start < 20
        connect(address, KEY, deadline_s=60, peer="engine").close()  # others are served
    assert "client 1 was dropped: client 1 came with a wrong key" in capfd.readouterr().err


def test_deadlines_name_the_peer_and_what_was_awaited(address):
    with pytest.raises(RolloutError, match="engine could not be reached at unix:.* within 0.2 s"):
        connect(address, KEY, deadline_s=0.2, peer="engine")
    with Running(address):
        connection = connect(address, KEY, deadline_s=60, peer="engine")
        with pytest.raises(RolloutError, match="the deadline passed; waited for 7 samples from engine"):
            connection.receive(deadline_s=0.1, awaiting="7 samples")
        connection.close()
        with pytest.raises(RolloutError, match="closed"):
            connection.receive(deadline_s=0.1, awaiting="7 samples")


def test_a_silent_listener_is_no_hang():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(RolloutError, match="the deadline passed; waited for the handshake with engine"):
            connect(f"tcp:127.0.0.1:{silent.getsockname()[1]}", KEY, deadline_s=0.3, peer="engine")


def test_a_peer_that_closes_is_named(address):
    running = Running(address)
    connection = connect(address, KEY, deadline_s=60, peer="engine")
    running.__exit__()
    with pytest.raises(RolloutError, match="engine closed the connection .*; waited for an answer"):
        connection.receive(deadline_s=60, awaiting="an answer")


def test_strangers_do_not_disturb(address):
    with Running(address) as running:
        for content in (b"GET / HTTP/1.1\r\n\r\n" * 20, b"", b"x"):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(address[5:])
            stranger.sendall(content)
            stranger.close()
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(address[5:])
        connection = connect(address, KEY, deadline_s=60, peer="engine")
        connection.send(m.Describe(1), deadline_s=60)
        assert connection.receive(deadline_s=60, awaiting="an answer") == m.Done(1)
        connection.close()
        idle.close()
        deadline = time.monotonic() + 60
        while running.gone < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.gone == 5


@pytest.mark.parametrize(
    "text",
    ["engine", "unix:relative", "tcp:127.0.0.1", "tcp:127.0.0.1:70000", "tcp::80", "http:a:1", "unix:/" + "x" * 120],
)
def test_wrong_addresses(text):
    with pytest.raises(RolloutError, match="address|longer"):
        parse_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_listening_on_every_interface_is_refused(host):
    with pytest.raises(RolloutError, match="every interface"):
        listen(f"tcp:{host}:0")


def test_an_address_in_use_is_an_error(address):
    with Running(address):
        with pytest.raises(RolloutError, match="cannot listen"):
            Server(address, KEY)


def test_the_clients_side_imports_neither_torch_nor_vllm():
    code = (
        "import sys, megatron_dgrpo.rollout.client, megatron_dgrpo.rollout.server, megatron_dgrpo.rollout.host;"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'vllm'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

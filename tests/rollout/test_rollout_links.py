"""What ranks tell rank 0 over sockets: only those with the key, in the ranks' order, and an end is noticed."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout.board import Board
from megatron_dgrpo.rollout.links import Links


@pytest.fixture
def three(tmp_path):
    """The links of three ranks, not joined yet, and what to join with."""
    links = []
    for rank in range(3):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 3)
        links.append(Links(Board(store, "topic", rank=rank, num_ranks=3, deadline_s=60)))
    yield links, links[0].open(str(tmp_path / "socket"))
    for link in links:
        link.close()


def test_lines_come_in_the_ranks_order_and_only_from_those_with_the_key(three):
    links, (path, key) = three
    with socket.socket(socket.AF_UNIX) as stranger, socket.socket(socket.AF_UNIX) as silent:
        for sock in (stranger, silent):
            sock.connect(path)
        stranger.sendall(b'["' + b"0" * len(key) + b'",1]\n["not mine"]\n')
        for rank in (2, 1):
            links[rank].join(path, key)
            links[rank].send(["of", rank])
            links[rank].send({"second": rank})
        assert links[0].collect("all") == [["of", 1], ["of", 2]]
        assert not os.path.exists(path)  # all have joined
        assert links[0].collect("all") == [{"second": 1}, {"second": 2}]
    for _ in range(3):
        links[0].free()
    links[1].await_freed(1, "one")
    links[1].await_freed(3, "three")
    links[2].await_freed(3, "three")


def test_who_goes_is_noticed_and_named(three):
    links, (path, key) = three
    for rank in (1, 2):
        links[rank].join(path, key)
        links[rank].send(rank)
    assert links[0].collect("all") == [1, 2]
    links[2].close()
    with pytest.raises(TransferError, match="rank 2 has gone; rank 0 waited for a bucket"):
        links[0].collect("a bucket")
    links[0].close()
    with pytest.raises(TransferError, match="rank 0 has gone; rank 1 waited for room"):
        links[1].await_freed(1, "room")

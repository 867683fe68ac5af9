"""What rank 0 tells the others while they wait for it: one sequence of messages in the store, read by all in order.

Waiting for a rollout is done here, with a deadline, and never inside a collective. One sequence carries everything, so
that a rank that waits for trajectories hears first that rank 0 needs its part of the weights: an engine that was lost
gets them back while a batch is under way. It could not be otherwise: rank 0 cannot end the batch before they arrive.
The weights are those of the batch, since they move only after it.

With the periodic schedule it is a thread of rank 0 that takes the engines' answers, and that asks for the weights; its
main thread hands out chunks meanwhile. One of them speaks at a time, and the others hear both in one order.
"""

from __future__ import annotations

import threading
from datetime import timedelta

import torch.distributed as dist

from megatron_dgrpo import points
from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout.codec import decode, encode
from megatron_dgrpo.rollout.messages import Chunk, WeightsWanted
from megatron_dgrpo.train.orders import Order

Announcement = Chunk | WeightsWanted | Order


class Announcements:
    def __init__(self, store: dist.Store) -> None:
        self._store, self._number = store, 0
        self._lock = threading.Lock()
        self._rank, self._num_readers = dist.get_rank(), dist.get_world_size() - 1

    def say(self, message: Announcement) -> None:
        """On rank 0."""
        assert self._rank == 0
        points.reached("announce")
        with self._lock:
            if self._num_readers:
                self._store.set(self._key(), encode(message))  # type: ignore[arg-type] # its stub says text
            self._number += 1

    def hear(self, deadline_s: float) -> Announcement:
        """On every other rank: the next message, within the deadline."""
        key = self._key()
        try:
            self._store.wait([key], timedelta(seconds=deadline_s))
        except dist.DistError as error:
            raise RolloutError(f"rank {self._rank} waited {deadline_s:g} s for rank 0's rollouts: {error}") from error
        message = decode(self._store.get(key))
        self._number += 1
        if self._store.add(f"{key}/read", 1) == self._num_readers:  # the last one clears up
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")
        assert isinstance(message, Announcement)
        return message

    def _key(self) -> str:
        return f"announcements/{self._number}"

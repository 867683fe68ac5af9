"""How ranks wait for each other without a collective: counters and keys in a store, a deadline, a key for failures.

Whoever waits looks at the failure key as well, so a rank that could not go on ends the others within milliseconds, with
its own words. A topic may be used again and again, by all ranks as often: each rank counts its turns in the store, and
the keys of a turn are its own. So a rank may be a turn ahead, or late for one that another has given up already. The
last rank to leave a turn removes its keys.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store

from megatron_dgrpo import points
from megatron_dgrpo.errors import TransferError

_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 0.0002, 0.02
_LATE = 0.1
"""How much later than it could a wait may end, as a part of it."""
Answer = TypeVar("Answer")


class Board:
    def __init__(self, store: Store, topic: str, *, rank: int, num_ranks: int, deadline_s: float) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._deadline = time.monotonic() + deadline_s
        turn = self._ask(lambda: store.add(f"{topic}/turns/{rank}", 1))
        self._store = PrefixStore(f"{topic}/{turn}", store)

    def left(self) -> float:
        """Seconds until the deadline; what waits for something else gets no more than these."""
        return max(0.001, self._deadline - time.monotonic())

    def leave(self, keys: Iterable[str]) -> None:
        """Say that this rank needs nothing more; the last one removes the keys. Never raises."""
        with contextlib.suppress(RuntimeError):  # a store that is gone has no keys to remove
            if self._store.add("left", 1) == self.num_ranks:
                for key in (*keys, "failure", "left"):
                    self._store.delete_key(key)

    def publish(self, key: str, value: bytes) -> None:
        points.reached("board.publish")
        self._ask(lambda: self._store.set(key, value))  # type: ignore[arg-type]

    def count(self, counter: str) -> None:
        self._ask(lambda: self._store.add(counter, 1))

    def fail(self, text: str) -> None:
        """Tell the others, if nobody has yet. Never raises."""
        with contextlib.suppress(RuntimeError):
            if not self._store.check(["failure"]):
                self._store.set("failure", text)

    def look(self, what: str) -> None:
        """Raise if a rank has failed or the deadline has passed. Whoever waits for anything looks now and then."""
        if self._ask(lambda: self._store.check(["failure"])):
            raise TransferError(f"{self._store.get('failure').decode()} (rank {self.rank} waited for {what})")
        if time.monotonic() > self._deadline:
            raise TransferError(f"the deadline passed: rank {self.rank} waited for {what}")

    def await_count(self, counter: str, value: int, what: str) -> None:
        self._poll(lambda: self._store.add(counter, 0) >= value or None, what)

    def await_turn(self, keys: list[str], number: int, what: str) -> list[list[Any]]:
        """Wait until each key holds a list in JSON that begins with this number; returns the rest of the lists."""

        def all_there() -> list[list[Any]] | None:
            if not self._store.check(keys):
                return None
            values = [json.loads(value) for value in self._store.multi_get(keys)]
            return [value[1:] for value in values] if all(value[0] == number for value in values) else None

        return self._poll(all_there, what) if keys else []

    def await_key(self, key: str, what: str) -> bytes:
        return self._poll(lambda: self._store.get(key) if self._store.check([key]) else None, what)

    def _poll(self, probe: Callable[[], Answer | None], what: str) -> Answer:
        start = time.monotonic()
        while (answer := self._ask(probe)) is None:
            self.look(what)
            time.sleep(min(_LONGEST_SLEEP_S, max(_SHORTEST_SLEEP_S, _LATE * (time.monotonic() - start))))
        return answer

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except RuntimeError as error:  # torch's DistError and its kin
            raise TransferError(f"the store that ranks meet at cannot be reached any more ({error})") from None

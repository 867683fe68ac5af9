"""What rank 0 says to the supervisor, over an authenticated Unix socket: that an engine host is of no use any more.

Only the supervisor ends and starts processes; only who speaks with an engine can tell that it hangs. A request names
the process it means, so that one that was started again meanwhile is left alone. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout.codec import register
from megatron_dgrpo.rollout.messages import Done
from megatron_dgrpo.rollout.server import Server
from megatron_dgrpo.rollout.wire import connect

_ANSWER_S = 60.0


@register
@dataclass(frozen=True)
class Discard:
    call: int
    name: str  # of the process
    pid: int
    why: str


class Listener:
    """The supervisor's end."""

    def __init__(self, address: str, key: str, discard: Callable[[str, int, str], None]) -> None:
        self._server, self._discard = Server(address, key), discard

    def attend(self) -> None:
        """Do what was asked since; does not wait."""
        for peer, message in self._server.poll(0.0):
            if isinstance(message, Discard):
                self._discard(message.name, message.pid, message.why)
                self._server.send(peer, Done(message.call))
            elif message is not None:
                self._server.drop(peer, f"sent a {type(message).__name__}, which is not for the supervisor")

    def close(self) -> None:
        self._server.close()


@dataclass(frozen=True)
class Control:
    """Rank 0's end."""

    address: str
    key: str

    def discard(self, name: str, pid: int, why: str) -> None:
        """Have this process of an engine host ended, if it still runs; another one is started in its place."""
        connection = connect(self.address, self.key, deadline_s=_ANSWER_S, peer="the supervisor")
        try:
            connection.send(Discard(1, name, pid, why), deadline_s=_ANSWER_S)
            answer = connection.receive(deadline_s=_ANSWER_S, awaiting="its answer")
        finally:
            connection.close()
        if not isinstance(answer, Done):
            raise RolloutError(f"the supervisor answered with a {type(answer).__name__}")

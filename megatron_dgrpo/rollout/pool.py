"""The replicas of one engine as one, on rank 0: requests are shared out, completions come back as they end.

**Nothing lost, nothing twice.** A batch knows which samples are missing. A replica that is lost (its connection ends,
or it hangs) takes the samples that it owed back into the batch; those are asked again, with their own seeds, of the
others, or of the lost one once it is there again. An answer is taken only for a sample that is missing, and only from
the connection that it was asked on, so that the old process cannot answer any more.

**Weights come first.** A replica that was connected has whatever weights its process loaded: it is *fresh*, and not
asked for anything until `restore` (the trainer's push of the current weights) has made it one of the others.

Who may start processes is the supervisor alone: a replica that hangs is reported to it (`control`), and the new one is
found at the same address. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_dgrpo.errors import RolloutError, listing
from megatron_dgrpo.rollout.batch import Batch
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.compatibility import Expected, between_replicas, differences, transport
from megatron_dgrpo.rollout.control import Control
from megatron_dgrpo.rollout.messages import EngineInfo, GenerateRequest
from megatron_dgrpo.rollout.wire import ConnectionLost


class Replica:
    """One engine host: its address, and the connection while there is one. `name` is that of the process."""

    def __init__(self, name: str, address: str, key: str, control: Control | None = None) -> None:
        self.name, self.address = name, address
        self.client: EngineClient | None = None
        self.info: EngineInfo | None = None
        self.fresh = True
        """Whether it has weights of its own making."""
        self.transport = ""
        """How it gets others; see `transports`."""
        self._key, self._control = key, control

    @property
    def connected(self) -> bool:
        return self.client is not None and not self.client.lost

    @property
    def serves(self) -> bool:
        return self.connected and not self.fresh

    def connect(self, deadline_s: float) -> None:
        """Wait for the host to be there; one that ends meanwhile may come again."""
        deadline = time.monotonic() + deadline_s
        while not self.connected:
            try:
                left = max(0.001, deadline - time.monotonic())
                self.client = EngineClient.connect(self.address, self._key, deadline_s=left, name=self.name)
                self.info = self.client.describe(deadline_s=max(0.001, deadline - time.monotonic()))
                self.fresh = True
            except ConnectionLost:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def lose(self, client: EngineClient, why: str) -> None:
        """Give this connection up, unless another one has taken its place; the process behind it is ended."""
        client.close()
        if client is self.client:
            self.client = None
            if self._control is not None and self.info is not None:
                self._control.discard(self.name, self.info.pid, why)


class Pool:
    """`restore` has to give the replicas of `targets(everywhere=False)` the current weights, and to say so by `given`.
    With `whole_again`, a replica that was lost is asked again for all that it was asked, itself and nobody else: what
    else is in a batch shows in the last bits of a log-prob."""

    def __init__(
        self,
        name: str,
        replicas: Sequence[Replica],
        expected: Expected,
        *,
        start_timeout_s: float,
        hang_timeout_s: float,
        restore: Callable[[], None],
        note: Callable[[str], None],
        whole_again: bool = False,
    ) -> None:
        assert replicas
        self.name, self.replicas, self.note = name, list(replicas), note
        self.hang_timeout_s, self.whole_again = hang_timeout_s, whole_again
        self._expected, self._start_timeout_s, self._restore = expected, start_timeout_s, restore

    # ---- generation ----

    def generate(self, requests: Sequence[GenerateRequest], *, deadline_s: float) -> Batch:
        """An iterator over completions. The requests are sent at once; the deadline of what is asked again begins
        anew."""
        return Batch(self, requests, deadline_s)

    def serving(self, *, all_of_them: bool = False) -> list[Replica]:
        """Replicas that can be asked: those that are there, or after a wait one at least; or all of them."""
        found = [replica for replica in self.replicas if replica.serves]
        if not found or (all_of_them and len(found) < len(self.replicas)):
            self._restore()
            found = [replica for replica in self.replicas if replica.serves]
            assert found, "whoever restores weights says so"
        return found

    # ---- weights ----

    def targets(self, *, everywhere: bool) -> list[Replica]:
        """All replicas, or those without the current weights, connected and alive; they serve again when `given`."""
        self.check()
        for replica in self.replicas:
            if not replica.connected:
                replica.connect(self._start_timeout_s)
                self._judge(replica)
        found = [replica for replica in self.replicas if everywhere or replica.fresh]
        for replica in found:
            replica.fresh = True  # until it has them, whatever happens in between
        return found

    @staticmethod
    def given(replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            replica.fresh = False

    def sleep(self) -> None:
        """Have all replicas give their GPUs' memory back; they have to be given weights before they serve again."""
        for replica in self.replicas:
            if replica.serves and replica.client is not None:
                replica.client.sleep(deadline_s=self.hang_timeout_s)
                replica.fresh = True

    def check(self) -> list[str]:
        """Names of connected replicas that are found dead or hanging; they are given up."""
        lost = []
        for replica in self.replicas:
            client = replica.client
            if client is None:
                continue
            try:
                client.describe(deadline_s=self.hang_timeout_s)
            except RolloutError as error:
                self.note(f"{replica.name} is lost: {error}")
                replica.lose(client, str(error))
                lost.append(replica.name)
        return lost

    def _judge(self, replica: Replica) -> None:
        assert replica.info is not None and replica.client is not None
        others = [(r.name, r.info) for r in self.replicas if r.info is not None and r.connected]
        problems = differences(self._expected, replica.name, replica.info) + between_replicas(others)
        replica.transport = transport(self._expected, replica.name, replica.info).transport or ""
        if problems:
            replica.client.close()
            raise RolloutError(listing(f"The engine {self.name} is not the one that this run needs:", problems))

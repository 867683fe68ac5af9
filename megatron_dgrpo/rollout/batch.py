"""One batch of requests on its way through the replicas of a pool; `pool` says what is promised of it.

A prompt's samples stay together, for the prefix cache. Prompts are shared out when they are asked, longest first, each
to the replica with the least to do: whoever reads the completions may be away for long (training), and the engines go
on without being fed.
"""

from __future__ import annotations

import select
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout.client import Completions, EngineClient
from megatron_dgrpo.rollout.messages import Completion, GenerateRequest
from megatron_dgrpo.rollout.wire import ConnectionLost

if TYPE_CHECKING:
    from megatron_dgrpo.rollout.pool import Pool, Replica

_LOOK_S = 0.5
"""How often a silent replica is looked after."""


class Batch:
    """Iterate over it. Closing it, or letting go of it, cancels what has not ended."""

    def __init__(self, pool: Pool, requests: Sequence[GenerateRequest], deadline_s: float) -> None:
        self._parts: list[_Part] = []
        twice = [name for name, count in Counter(r.prompt_id for r in requests).items() if count > 1]
        if twice:
            raise RolloutError(
                f"prompts {twice[:5]} are there twice in one batch: their samples could not be told apart"
            )
        self._pool, self._deadline_s = pool, deadline_s
        self._requests = {request.prompt_id: request for request in requests}
        self._missing = {request.prompt_id: set(range(len(request.seeds))) for request in requests}
        self._ready: deque[Completion] = deque()
        self._ask({name: sorted(samples) for name, samples in self._missing.items()})

    def __iter__(self) -> Iterator[Completion]:
        return self

    def __next__(self) -> Completion:
        while not self._ready:
            if not any(self._missing.values()):
                raise StopIteration
            self._advance()
        return self._ready.popleft()

    @property
    def num_missing(self) -> int:
        return sum(map(len, self._missing.values()))

    def close(self) -> None:
        for part in self._parts:
            part.completions.close()
        self._parts = []
        self._missing = {}

    def __del__(self) -> None:
        for part in self._parts:
            part.completions.close()

    # ---- asking ----

    def _ask(self, wanted: Mapping[str, Sequence[int]], only: Replica | None = None) -> None:
        """Ask for these samples of these prompts, of one replica or of all; once more, should one be lost over it."""
        whole, waiting = self._pool.whole_again, [(dict(wanted), only)]
        while waiting:
            asked, only = waiting.pop()
            serving = self._pool.serving(all_of_them=whole)
            replicas = [only] if only is not None else serving
            for replica, share in zip(replicas, self._shares(asked, replicas), strict=True):
                if not share:
                    continue
                client = replica.client
                assert client is not None
                try:
                    self._parts.append(self._part(replica, client, share))
                except ConnectionLost as error:
                    self._pool.note(f"{replica.name} is lost: {error}")
                    replica.lose(client, str(error))
                    waiting.append((share, replica if whole else None))

    def _part(self, replica: Replica, client: EngineClient, share: dict[str, Sequence[int]]) -> _Part:
        requests = [
            replace(self._requests[name], seeds=tuple(self._requests[name].seeds[i] for i in samples))
            for name, samples in share.items()
        ]
        limit = self._pool.hang_timeout_s
        completions = client.generate(requests, deadline_s=self._deadline_s, send_s=limit)
        return _Part(replica, client, completions, share, time.monotonic() + self._deadline_s, limit)

    def _shares(self, asked: dict[str, Sequence[int]], replicas: Sequence[Replica]) -> list[dict[str, Sequence[int]]]:
        """Longest first, each prompt to the replica with the least to do."""
        costs = {name: self._cost(name, len(samples)) for name, samples in asked.items()}
        shares: list[dict[str, Sequence[int]]] = [{} for _ in replicas]
        loads = [sum(self._owed(p) for p in self._parts if p.replica is replica) for replica in replicas]
        for name in sorted(asked, key=lambda name: -costs[name]):
            least = loads.index(min(loads))
            shares[least][name] = asked[name]
            loads[least] += costs[name]
        return shares

    def _cost(self, name: str, num_samples: int) -> int:
        request = self._requests[name]
        return len(request.prompt_tokens) + num_samples * request.max_tokens

    def _owed(self, part: _Part) -> int:
        left = {name: self._missing[name].intersection(samples) for name, samples in part.asked.items()}
        return sum(self._cost(name, len(samples)) for name, samples in left.items() if samples)

    # ---- answers ----

    def _advance(self) -> None:
        """Take what has come; where nothing has, wait a little for something."""
        poll, filed = select.poll(), False
        for part in self._parts:
            if part.client.lost:
                filed = True  # lost by another batch, or by a push of weights
            else:
                poll.register(part.client, select.POLLIN)
                filed |= part.completions.filed
        ready = {descriptor for descriptor, _ in poll.poll(0 if filed else 1000 * _LOOK_S)}
        for part in list(self._parts):
            try:
                self._store(part, part.take(part.client.fileno() in ready))
            except RolloutError as error:
                if not isinstance(error, ConnectionLost) and not part.client.lost:
                    raise
                self._lose(part, str(error))

    def _store(self, part: _Part, completions: Sequence[Completion]) -> None:
        for completion in completions:
            sample = part.asked[completion.prompt_id][completion.sample]
            if sample in self._missing[completion.prompt_id]:  # else it is one that was asked again with the whole
                self._missing[completion.prompt_id].remove(sample)
                self._ready.append(replace(completion, sample=sample))
        if not any(self._missing[name].intersection(samples) for name, samples in part.asked.items()):
            self._parts.remove(part)
            part.completions.close()

    def _lose(self, part: _Part, why: str) -> None:
        """Ask again for what a lost replica owes."""
        self._parts.remove(part)
        part.replica.lose(part.client, why)
        owed = {name: sorted(self._missing[name].intersection(samples)) for name, samples in part.asked.items()}
        owed = {name: samples for name, samples in owed.items() if samples}
        again = part.asked if self._pool.whole_again else owed
        count = sum(map(len, again.values()))
        self._pool.note(
            f"{part.replica.name} is lost in the middle of a batch: {count} samples are asked again ({why})"
        )
        self._ask(again, part.replica if self._pool.whole_again else None)


class _Part:
    """What one replica was asked on one connection: of each prompt, which samples."""

    def __init__(
        self,
        replica: Replica,
        client: EngineClient,
        completions: Completions,
        asked: Mapping[str, Sequence[int]],
        deadline: float,
        hang_timeout_s: float,
    ) -> None:
        self.replica, self.client, self.completions, self.asked = replica, client, completions, asked
        self._deadline, self._patience_s = deadline, hang_timeout_s / 2
        self._heard, self._question = time.monotonic(), 0

    def take(self, readable: bool) -> list[Completion]:
        """What has come. One that is silent is asked whether it lives, which it answers within a step; ConnectionLost
        if it does not. Its silence counts from when it was asked: nobody may have listened before."""
        if self.client.lost:
            raise ConnectionLost(f"{self.client.name}: its connection was given up")
        if readable:
            self.client.take_in()
        completions = self.completions.take()
        now = time.monotonic()
        if readable or completions:
            self._heard = now
        if self._question:
            if self.client.answered(self._question):
                self._heard, self._question = now, 0
            elif now - self._heard > self._patience_s and not readable:
                raise ConnectionLost(f"{self.client.name} has not answered for {2 * self._patience_s:g} s: it hangs")
        elif now - self._heard > self._patience_s:
            self._heard, self._question = now, self.client.ask()
        if now > self._deadline:
            raise RolloutError(f"the deadline passed; waited for {self.completions.awaited} from {self.client.name}")
        return completions

"""The trainer's side of an engine host. Imports neither torch nor vLLM.

Every wait has a deadline. What the host could not do is raised where its answer was awaited: TransferError for weights,
RolloutError for everything else.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.rollout import messages as m
from megatron_dgrpo.rollout.wire import Connection, ConnectionLost, connect

_SHORT_S = 60.0
"""For questions that are answered within one step of the engine, and for sending."""
_PART_BYTES = 2**20
"""Of a bucket that is sent; what both sides hold of it beside their files."""


class EngineClient:
    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self._connection = connection
        self._calls = itertools.count(1)
        self._mail: dict[int, list[Any]] = {}
        self._buckets: set[int] = set()

    @classmethod
    def connect(cls, address: str, key: str, *, deadline_s: float, owner: bool = True, name: str = "") -> Self:
        """Wait for the host to listen, prove the key, say whether this client owns it: it ends with its last owner."""
        name = name or f"the engine at {address}"
        start = time.monotonic()
        client = cls(connect(address, key, deadline_s=deadline_s, peer=name), name)
        try:
            call = client._open()
            client._send(m.Attach(call, owner))
            left = deadline_s - (time.monotonic() - start)
            client._answer(call, m.Described, max(left, 0.001), "its description")
        except RolloutError:
            client.close()
            raise
        return client

    @property
    def lost(self) -> bool:
        """Whether the connection is closed, from whichever side."""
        return self._connection.fileno() < 0

    def fileno(self) -> int:
        """Readable when `take_in` has something to do."""
        return self._connection.fileno()

    def take_in(self) -> None:
        """File what has come, without waiting."""
        for message in self._connection.take():
            self._file(message)

    def ask(self) -> int:
        """Ask for a description, which any host that lives gives within one step of its engine; see `answered`."""
        call = self._open()
        self._send(m.Describe(call))
        return call

    def answered(self, call: int) -> bool:
        """Whether the answer has come; it is not kept."""
        return bool(self._mail[call]) and self._mail.pop(call) is not None

    def describe(self, *, deadline_s: float = _SHORT_S) -> m.EngineInfo:
        call = self._open()
        self._send(m.Describe(call))
        return self._answer(call, m.Described, deadline_s, "its description").info

    def shutdown(self, *, deadline_s: float = _SHORT_S) -> None:
        """End the host, whoever else uses it."""
        call = self._open()
        self._send(m.Shutdown(call))
        self._answer(call, m.Done, deadline_s, "its last answer")
        self.close()

    def close(self) -> None:
        self._connection.close()

    # ---- generation ----

    def generate(
        self, requests: Sequence[m.GenerateRequest], *, deadline_s: float, send_s: float | None = None
    ) -> Completions:
        """The requests are sent at once (within `send_s`, if that is less); completions come as they end."""
        twice = [name for name, count in Counter(r.prompt_id for r in requests).items() if count > 1]
        if twice:
            raise RolloutError(
                f"prompts {twice[:5]} are there twice in one call: their samples could not be told apart"
            )
        deadline = time.monotonic() + deadline_s
        call = self._open()
        self._send(m.Generate(call, tuple(requests)), min(deadline_s, send_s or deadline_s))
        return Completions(self, call, sum(len(r.seeds) for r in requests), deadline)

    # ---- weights ----

    def begin_update(
        self,
        version: int,
        tensors: Sequence[m.TensorSpec],
        path: str,
        num_bytes: int,
        *,
        source: str = "file",
        deadline_s: float,
    ) -> None:
        """Raises if the tensors do not fit the engine's model; then nothing has changed."""
        call = self._open()
        self._send(m.BeginUpdate(call, version, tuple(tensors), path, num_bytes, source), deadline_s)
        self._answer(call, m.Done, deadline_s, "its judgement of the manifest")

    def load_bucket(
        self,
        names: Sequence[str],
        offsets: Sequence[int],
        checksums: Sequence[int] = (),
        rows: Sequence[tuple[int, int]] = (),
        *,
        data: np.ndarray | None = None,
        deadline_s: float = _SHORT_S,
    ) -> int:
        """Tell the engine that these tensors, or rows of them, lie in the file; where it has no part in the trainer's
        file, `data` are the bytes from the first offset on. Returns what `bucket_loaded` needs."""
        call, deadline = self._open(), time.monotonic() + deadline_s
        for start in range(0, 0 if data is None else len(data), _PART_BYTES):
            assert data is not None
            part = m.WeightBytes(call, min(offsets) + start, data[start : start + _PART_BYTES])
            self._send(part, max(0.001, deadline - time.monotonic()))
        deadline_s = max(0.001, deadline - time.monotonic())
        columns = [tuple(column) for column in zip(*rows, strict=True)]
        self._send(m.LoadBucket(call, tuple(names), tuple(offsets), tuple(checksums), *columns), deadline_s)
        self._buckets.add(call)
        return call

    def bucket_loaded(self, call: int, *, deadline_s: float) -> None:
        """Wait until the engine has read a bucket: its place in the file may be overwritten."""
        self._buckets.discard(call)
        self._answer(call, m.Done, deadline_s, "the end of its reading a bucket of weights")

    def join_update(self, how: str, *, deadline_s: float) -> int:
        """Have the engine join an NCCL group, which all its members have to do at once. See `joined`."""
        call = self._open()
        self._send(m.JoinUpdate(call, how), deadline_s)
        return call

    def joined(self, call: int, *, deadline_s: float) -> None:
        self._answer(call, m.Done, deadline_s, "its joining the group that weights travel in")

    def sleep(self, *, deadline_s: float) -> None:
        """Have the engine give its GPU's memory back; nothing may be unfinished."""
        call = self._open()
        self._send(m.Sleep(call), deadline_s)
        self._answer(call, m.Done, deadline_s, "its going to sleep")

    def wake(self, what: str, *, deadline_s: float) -> None:
        """Have it take memory for its "weights", or its "kv_cache", again."""
        call = self._open()
        self._send(m.Wake(call, what), deadline_s)
        self._answer(call, m.Done, deadline_s, "its waking up")

    def finish_update(self, version: int, *, deadline_s: float) -> None:
        call = self._open()
        self._send(m.FinishUpdate(call, version), deadline_s)
        self._answer(call, m.Done, deadline_s, f"weights of version {version}")

    def abandon_update(self, *, deadline_s: float = _SHORT_S) -> None:
        """Give up a half-done update; the engine generates again once another was finished."""
        while self._buckets:
            self._mail.pop(self._buckets.pop(), None)
        call = self._open()
        self._send(m.AbandonUpdate(call), deadline_s)
        self._answer(call, m.Done, deadline_s, "its leave to give up an update")

    # ---- calls and their answers ----

    def _open(self) -> int:
        call = next(self._calls)
        self._mail[call] = []
        return call

    def _send(self, message: Any, deadline_s: float = _SHORT_S) -> None:
        self._connection.send(message, deadline_s=deadline_s)

    def _answer(self, call: int, kind: type, deadline_s: float, awaiting: str) -> Any:
        """The one answer to a call."""
        try:
            return self._next(call, kind, deadline_s, awaiting)
        finally:
            self._mail.pop(call, None)

    def _next(self, call: int, kind: type, deadline_s: float, awaiting: str) -> Any:
        deadline = time.monotonic() + deadline_s
        box = self._mail[call]
        while not box:
            self._file(self._connection.receive(deadline_s=deadline - time.monotonic(), awaiting=awaiting))
        return self._judge(box.pop(0), kind, awaiting)

    def _file(self, message: Any) -> None:
        if message.call in self._mail:  # else the call was given up
            self._mail[message.call].append(message)

    def _judge(self, message: Any, kind: type, awaiting: str) -> Any:
        if isinstance(message, m.Failure):
            kinds = {"transfer": TransferError, "engine": ConnectionLost}
            raise kinds.get(message.kind, RolloutError)(f"{self.name}: {message.message}")
        if not isinstance(message, kind):
            raise RolloutError(f"{self.name} answered with a {type(message).__name__}; waited for {awaiting}")
        return message


class Completions:
    """An iterator over the samples of one call. Closing it, or letting go of it, cancels those that have not ended."""

    def __init__(self, client: EngineClient, call: int, num_samples: int, deadline: float) -> None:
        self._client, self._call, self._deadline = client, call, deadline
        self._num_samples = self._num_left = num_samples

    def __iter__(self) -> Iterator[m.Completion]:
        return self

    def __next__(self) -> m.Completion:
        if not self._num_left:
            raise StopIteration
        try:
            left = self._deadline - time.monotonic()
            answer = self._client._next(self._call, m.Completed, left, self.awaited)
        except BaseException:
            self.close()
            raise
        return self._count(answer)

    def take(self) -> list[m.Completion]:
        """Those that were filed (`EngineClient.take_in`), without waiting."""
        box, taken = self._client._mail.get(self._call, []), []
        try:
            while box:
                taken.append(self._count(self._client._judge(box.pop(0), m.Completed, self.awaited)))
        except BaseException:
            self.close()
            raise
        return taken

    @property
    def filed(self) -> bool:
        """Whether `take` has something to give."""
        return bool(self._client._mail.get(self._call))

    @property
    def awaited(self) -> str:
        return f"{self._num_left} of {self._num_samples} samples"

    def _count(self, answer: m.Completed) -> m.Completion:
        self._num_left -= 1
        if not self._num_left:
            self.close()
        return answer.completion

    def close(self) -> None:
        if self._client._mail.pop(self._call, None) is not None and self._num_left:
            with contextlib.suppress(RolloutError):  # if the host has gone, there is nothing to cancel
                self._client._send(m.Cancel(self._call))
        self._num_left = 0

    def __del__(self) -> None:
        self.close()

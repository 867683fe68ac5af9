"""Processes that score responses, and what is done when one hangs or dies. Imports no torch.

**Ends.** Nothing outlives the owner: a worker asks the kernel to be killed with the thread that started it, and that
thread (`_starter`) lives as long as the owner's process. A worker that is killed for a sample takes its process group
with it. Under a run's supervisor the server of the trainer's processes is above all of them, too, and ends what is
left.

**Order.** Samples are handed out in tasks of one reward and a few samples; the answers carry their index. The sample
that a worker was at when it hung or died has failed; the rest of its task goes to a fresh worker. So every sample ends
with a number or with the reason why there is none, and one bad response costs only itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dgrpo.config.rewards import AnyReward, Judge
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Failure, Sample

START_S = 120.0
"""How long a worker may take to start, or to make a reward (a user's module may import much)."""
GRACE_S = 2.0
"""How much longer than the deadline, which the worker keeps by itself if it can, before it is killed."""
_TASK_SAMPLES = 16
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_dgrpo.rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass
class _Task:
    reward: AnyReward
    samples: Sequence[Sample | None]
    places: list[int]
    """Which of `samples` are still to do."""
    results: list[float | Failure]
    """Of all `samples`; filled in where they stand."""
    attempts: int = 0
    """How often it may have been the reason why a worker was lost before it said which sample it is at."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    log_path: Path | None
    buffer: bytes = b""
    task: _Task | None = None
    places: list[int] = field(default_factory=list)  # of the task's samples, by the index that the worker knows
    open: set[int] = field(default_factory=set)  # indices that have no answer yet
    at: int | None = None  # the index that it is at
    ready: bool = False  # it has made the task's reward
    has_served: bool = False  # it has ended a task before this one
    deadline: float = 0.0

    def fileno(self) -> int:
        return self.channel.fileno()


class RewardPool:
    """Workers are started when there is work for them. One caller at a time. A context manager; else `close` it."""

    def __init__(self, num_workers: int, *, log_dir: Path | None = None) -> None:
        assert num_workers > 0
        self._num_workers, self._log_dir = num_workers, log_dir
        self._workers: list[_Worker] = []
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="reward-starter")
        self._num_started = 0

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def score(self, rewards: Sequence[AnyReward], samples: Sequence[Sample]) -> list[list[float | Failure]]:
        """For each reward a number, or the reason why there is none, for each sample in their order.

        RewardError where a reward cannot be made at all.
        """
        results: list[list[float | Failure]] = [[] for _ in rewards]
        waiting: deque[_Task] = deque()
        for reward, row in zip(rewards, results, strict=True):
            shown = [_after(reward, sample) for sample in samples]
            places = [place for place, sample in enumerate(shown) if sample is not None]
            row[:] = [0.0 if sample is None else Failure("it was not scored") for sample in shown]
            size = min(_TASK_SAMPLES, -(-len(places) // (2 * self._num_workers)))
            if isinstance(reward, Judge):  # it asks many at a time
                size = len(places)
            for start in range(0, len(places), max(1, size)):
                waiting.append(_Task(reward, shown, places[start : start + size], row))
        try:
            self._run(waiting)
        except BaseException:
            self._kill_all()  # they may be in the middle of a task
            raise
        return results

    def problems(self, rewards: Sequence[AnyReward]) -> list[str]:
        """What would keep these rewards from working at all: each is made once, and a judge is asked for its models."""
        found = []
        for reward in rewards:
            try:
                self._run(deque([_Task(reward, [], [], [])]))
            except RewardError as error:
                found.append(str(error))
                self._kill_all()
        return found

    def close(self) -> None:
        self._kill_all()
        self._starter.shutdown()

    # ---- the loop ----

    def _run(self, waiting: deque[_Task]) -> None:
        while waiting or any(worker.task for worker in self._workers):
            self._hand_out(waiting)
            busy = [worker for worker in self._workers if worker.task]
            if not busy:  # every task that was left has failed before a worker could take it
                continue
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = select.select(busy, [], [], max(0.0, left))[0]
            for worker in ready:
                if not self._read(worker):
                    self._lost(worker, waiting, self._obituary(worker))
            for worker in self._workers[:]:
                if worker.task and worker.deadline < time.monotonic():
                    self._lost(worker, waiting, _too_long(worker))

    def _hand_out(self, waiting: deque[_Task]) -> None:
        while waiting:
            worker = next((worker for worker in self._workers if worker.task is None), None)
            if worker is None:
                if len(self._workers) >= self._num_workers:
                    return
                worker = self._starter.submit(self._start).result()  # see "Ends" above
                self._workers.append(worker)
            task = waiting.popleft()
            worker.task, worker.places, worker.at, worker.ready = task, task.places, None, False
            worker.open = set(range(len(task.places)))
            worker.deadline = time.monotonic() + START_S
            try:
                worker.channel.settimeout(START_S)
                worker.channel.sendall(_message(task))
            except OSError:  # it is gone, which reading tells of, too
                self._lost(worker, waiting, self._obituary(worker))

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        number, self._num_started = self._num_started, self._num_started + 1
        path = [*(path or os.getcwd() for path in sys.path), os.getcwd()]
        log_path = self._log_dir / f"reward-worker{number % self._num_workers}.log" if self._log_dir else None
        if log_path:
            log_path.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open(log_path or os.devnull, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(path), str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return _Worker(process, ours, log_path)

    def _read(self, worker: _Worker) -> bool:
        """Take in its answers. False when it is gone."""
        try:
            data = worker.channel.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            return False
        *lines, worker.buffer = (worker.buffer + data).split(b"\n")
        for line in lines:
            self._take(worker, json.loads(line))
        return True

    def _take(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        task = worker.task
        assert task is not None
        limit_s = task.reward.deadline_s + GRACE_S
        if "broken" in message:
            raise RewardError(f"reward {task.reward.label} cannot be used: {message['broken']}")
        if "ready" in message:
            worker.ready = True
            # one that has many samples at work keeps each one's deadline itself; this is that of all
            rounds = -(-len(task.places) // task.reward.concurrency) if isinstance(task.reward, Judge) else 1
            worker.deadline = time.monotonic() + limit_s * max(1, rounds)
        elif "begin" in message:
            worker.at, worker.deadline = message["begin"], time.monotonic() + limit_s
        elif "done" in message:
            worker.task, worker.has_served = None, True
        else:
            index = message["index"]
            worker.open.discard(index)
            place = worker.places[index]
            task.results[place] = Failure(message["failed"]) if "failed" in message else message["value"]

    def _lost(self, worker: _Worker, waiting: deque[_Task], why: str) -> None:
        """It hangs or is dead: the sample it was at has failed; the others that have no answer are done again."""
        task = worker.task
        self._kill(worker)
        self._workers.remove(worker)
        if task is None:
            return
        if not task.places:
            if worker.ready or not worker.has_served:
                raise RewardError(f"reward {task.reward.label} cannot be used: {why}")
            waiting.appendleft(task)
            return
        if worker.at is None:  # before the first, or with many at once: whose fault it is can't be said
            culprits = worker.open if task.attempts else set()
        else:
            culprits = {worker.at} & worker.open
        for index in culprits:
            task.results[worker.places[index]] = Failure(why)
        if rest := [worker.places[index] for index in sorted(worker.open - culprits)]:
            # one that had served before and said nothing of this task may have been dead when it was handed out
            is_suspect = worker.at is None and (worker.ready or not worker.has_served)
            waiting.appendleft(_Task(task.reward, task.samples, rest, task.results, task.attempts + is_suspect))

    @staticmethod
    def _obituary(worker: _Worker) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(GRACE_S)
        status = worker.process.returncode
        if status is None:
            how = "does not answer any more"
        else:
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"its process {how}{_last_line(worker.log_path)}"

    @staticmethod
    def _kill(worker: _Worker) -> None:
        worker.channel.close()
        if worker.process.returncode is None:  # not waited for, so the number cannot be another's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.wait()

    def _kill_all(self) -> None:
        for worker in self._workers:
            self._kill(worker)
        self._workers.clear()


def _after(reward: AnyReward, sample: Sample) -> Sample | None:
    """The sample as the reward sees it; None without the marker."""
    text = sample.text
    if reward.after is not None:
        _, marker, text = text.rpartition(reward.after)
        if not marker:
            return None
    wanted = reward.row_fields
    fields = sample.fields if wanted is None else {n: sample.fields[n] for n in wanted if n in sample.fields}
    return Sample(sample.name, text, sample.prompt, sample.answer, fields)


def _message(task: _Task) -> bytes:
    """A row goes once for all of its responses in the task."""
    rows: list[dict[str, Any]] = []
    samples, known = [], {}
    for place in task.places:
        sample = task.samples[place]
        assert sample is not None
        if sample.name not in known:
            known[sample.name] = len(rows)
            rows.append(
                {"name": sample.name, "prompt": sample.prompt, "answer": sample.answer, "fields": sample.fields}
            )
        samples.append((known[sample.name], sample.text))
    content = {"reward": task.reward.model_dump_json(), "limit_s": task.reward.deadline_s}
    try:
        return json.dumps(content | {"rows": rows, "samples": samples}, default=_plain).encode() + b"\n"
    except TypeError as error:
        raise RewardError(f"reward {task.reward.label} cannot be given {rows[0]['name']}'s fields: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r:.80} is no JSON; leave the field out, or write it as text")


def _too_long(worker: _Worker) -> str:
    assert worker.task is not None
    if not worker.ready:
        return f"its process was not ready within {START_S:g} s and was ended"
    return f"it took more than {worker.task.reward.deadline_s:g} s, and its process was ended"


def _last_line(path: Path | None) -> str:
    if path is None or not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return f"; the last line of {path.name}: {lines[-1][:200]}" if lines else ""

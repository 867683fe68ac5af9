"""A step's trajectories, chunk by chunk, on every rank: how generating and training follow each other.

`synchronous` has one chunk, the whole batch, in the order of its prompts. `periodic` has a chunk whenever some groups
have ended: a thread of rank 0 drains the engine's answers, scores them and writes them into the journal while its main
thread trains. The engine is thus never kept waiting, and what it has answered never piles up in a socket; groups beyond
`groups_in_memory` are dropped from memory and read back from the journal when their turn comes.

All ranks must train on the same chunks. Rank 0 alone knows what has ended: it publishes each chunk in the store, and
the others wait for it there with a deadline, never in a collective. A chunk also says whether it is the last one. It
is in the journal, synced, before it is published.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from megatron_dgrpo.config.schema import DGRPO, Periodic
from megatron_dgrpo.data.dataset import PromptRow
from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.rollout.journal import Began, Journal, Place
from megatron_dgrpo.rollout.messages import Chunk, Group
from megatron_dgrpo.train.collect import Asked, patience_s, scored_groups
from megatron_dgrpo.train.run import Run


def chunks(
    run: Run, stage: DGRPO, number: int, step: int, rows: Sequence[PromptRow], phases: Phases
) -> Iterator[list[Trajectory]]:
    """The step's trajectories, whole groups at a time; `rows` are asked for by rank 0 and need be there alone."""
    asked = Asked(
        stage.engine,
        rows,
        stage.sampling,
        num_samples=stage.group_size,
        rewards=stage.rewards,
        seed=run.config.seed + number,
        step=step,
    )
    source = None
    if run.journal is not None:
        prompt_ids = tuple(row.name for row in rows)
        began = Began(number, step, run.version, prompt_ids, asked.num_samples, stage.updates_per_batch)
        run.journal.begin(began)
        source = _source(run, stage, asked, phases)
    last = False
    while not last:
        with phases("generate"):
            chunk = run.share(next(source) if source is not None else None, patience_s(run, stage.engine))
        last = chunk.last
        yield [trajectory for group in chunk.groups for trajectory in group.trajectories]


def _source(run: Run, stage: DGRPO, asked: Asked, phases: Phases) -> Iterator[Chunk]:
    """Rank 0's chunks, each of them safe in the journal."""
    journal, schedule = run.journal, stage.schedule
    assert journal is not None
    place = {row.name: number for number, row in enumerate(asked.rows)}
    in_order = lambda groups: tuple(sorted(groups, key=lambda group: place[group.prompt_id]))  # noqa: E731
    if not isinstance(schedule, Periodic):
        groups = []
        for group in scored_groups(run, asked, phases):
            journal.append(group)
            groups.append(group)
        journal.sync()
        yield Chunk(in_order(groups), last=True)
        return
    feed = Feed(scored_groups(run, asked, Phases()), len(place), journal, in_memory=schedule.groups_in_memory)
    last = False
    while not last:
        groups, last = feed.take(schedule.chunk_groups, patience_s(run, stage.engine))
        journal.sync()
        yield Chunk(in_order(groups), last)


class Feed:
    """`count` groups that a thread takes from a source as they come, for another thread that takes them when it can."""

    def __init__(self, source: Iterator[Group], count: int, journal: Journal, *, in_memory: int) -> None:
        self._source, self._journal, self._in_memory = source, journal, in_memory
        self._changed = threading.Condition()
        self._waiting: deque[Group | Place] = deque()
        self._left = count  # to be taken
        self._ended = False
        self._error: BaseException | None = None
        self.held = self.most_held = 0
        """Of those that wait, in memory: now, and at most so far."""
        self._thread = threading.Thread(target=self._drain, name="feed", daemon=True)
        self._thread.start()

    def take(self, at_least: int, deadline_s: float) -> tuple[list[Group], bool]:
        """What waits, once there are so many or no more will come, and whether it is the last; raises what the source
        raised. After the last one the thread has ended and the source may be used by others."""
        at_least = min(at_least, self._left)
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended or len(self._waiting) >= at_least, deadline_s):
                raise RolloutError(
                    f"{len(self._waiting)} groups have ended within {deadline_s:g} s, of {at_least} to train on: look "
                    "for a reward or an engine that hangs"
                )
            found = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._in_memory))]
            self.held -= sum(isinstance(one, Group) for one in found)
        self._left -= len(found)
        if not self._left:
            self._thread.join(deadline_s)
        if self._error is not None:
            raise self._error
        return [one if isinstance(one, Group) else self._journal.read(one) for one in found], not self._left

    def _drain(self) -> None:
        try:
            for group in self._source:
                place = self._journal.append(group)
                with self._changed:
                    fits = self.held < self._in_memory
                    self._waiting.append(group if fits else place)
                    self.held += fits
                    self.most_held = max(self.most_held, self.held)
                    self._changed.notify()
        except BaseException as error:  # of whatever kind: it belongs to who waits
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

"""The feed between an engine that generates and a trainer that takes what has ended: nothing lost, bounded memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_dgrpo.errors import RewardError, RolloutError
from megatron_dgrpo.packing.trajectory import Segment
from megatron_dgrpo.rollout.journal import Began, Journal, read_step
from megatron_dgrpo.rollout.messages import Group, Response
from megatron_dgrpo.train.feed import Feed

COUNT = 12
IDS = tuple(f"p{number}" for number in range(COUNT))


def _group(number: int) -> Group:
    segment = Segment(np.full(3, number, np.int32), True, np.full(3, -number, np.float32))
    return Group(IDS[number], np.arange(2, dtype=np.int32), (Response(0, number, (segment,), "stop", {}),))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path)
    journal.begin(Began(0, 1, 0, IDS, 1, 1))
    return journal


def _wait(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _numbers(groups: list[Group]) -> list[int]:
    for group in groups:
        number = IDS.index(group.prompt_id)
        assert group.responses[0].segments[0].tokens.tolist() == [number] * 3
    return [IDS.index(group.prompt_id) for group in groups]


def test_the_source_is_drained_while_the_trainer_works_and_memory_is_bounded(journal: Journal) -> None:
    done = threading.Event()

    def source() -> Iterator[Group]:
        yield from map(_group, range(COUNT))
        done.set()

    feed = Feed(source(), COUNT, journal, in_memory=3)
    assert done.wait(60), "the source was kept waiting by a trainer that takes nothing"
    assert feed.most_held == 3
    taken, last = [], False
    while not last:
        groups, last = feed.take(1, 10)
        assert 1 <= len(groups) <= 3
        taken += _numbers(groups)
        assert feed.held <= 3
    assert taken == list(range(COUNT))
    assert len(read_step(journal.folder, 0, 1).groups) == COUNT


def test_chunks_are_taken_as_soon_as_there_are_enough_and_the_rest_at_the_end(journal: Journal) -> None:
    gate = threading.Semaphore(0)

    def source() -> Iterator[Group]:
        for number in range(5):
            gate.acquire()
            yield _group(number)

    feed = Feed(source(), 5, journal, in_memory=64)
    gate.release(2)
    assert _numbers(feed.take(2, 10)[0]) == [0, 1]
    with pytest.raises(RolloutError, match="0 groups have ended within 0.05 s, of 2"):
        feed.take(2, 0.05)
    gate.release(1)
    _wait(lambda: feed.held == 1)
    with pytest.raises(RolloutError, match="1 groups"):
        feed.take(2, 0.05)
    gate.release(1)
    groups, last = feed.take(2, 10)
    assert (_numbers(groups), last) == ([2, 3], False)
    gate.release(1)
    groups, last = feed.take(2, 10)  # fewer than two are left
    assert (_numbers(groups), last) == ([4], True)
    assert not any(thread.name == "feed" for thread in threading.enumerate()), "the engine is free for others"


def test_an_error_of_the_source_is_the_takers(journal: Journal) -> None:
    def source() -> Iterator[Group]:
        yield _group(0)
        raise RewardError("the reward broke")

    with pytest.raises(RewardError, match="the reward broke"):
        Feed(source(), 5, journal, in_memory=64).take(2, 10)


def test_an_error_after_the_last_group_is_seen_as_well(journal: Journal) -> None:
    def source() -> Iterator[Group]:
        yield _group(0)
        time.sleep(0.1)
        raise RolloutError("an answer too many")

    with pytest.raises(RolloutError, match="an answer too many"):
        Feed(source(), 1, journal, in_memory=64).take(1, 10)


def test_a_full_disk_in_the_thread_ends_the_taking(journal: Journal) -> None:
    os.dup2(os.open("/dev/full", os.O_RDWR), journal._file)
    with pytest.raises(RolloutError, match="No space left on device.*keep_rollouts"):
        Feed(map(_group, range(5)), 5, journal, in_memory=64).take(1, 10)

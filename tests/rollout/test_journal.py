"""The journal: what was written comes back to the bit; what was torn, damaged or refused by the disk is seen."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.packing.trajectory import Segment
from megatron_dgrpo.rollout.codec import MAGIC
from megatron_dgrpo.rollout.journal import Began, Journal, Trained, read_step, segment_path, steps
from megatron_dgrpo.rollout.messages import Group, Response

PROMPTS = ("a@0", "b@0", "c@0")


def _group(number: int, length: int = 5) -> Group:
    draw = np.random.default_rng(number)
    responses = []
    for sample in range(2):
        count = length + sample
        logprobs = -draw.exponential(1.0, count).astype(np.float32)
        logprobs[0] = np.float32(-0.0)
        sampled = Segment(
            draw.integers(0, 2**31 - 1, count).astype(np.int32), True, logprobs, None, np.full(count, 7, np.int32)
        )
        tool = Segment(np.array([1, 2], np.int32), False)
        rewards = {"exact_match": 0.1 + 0.2, "judge": float(draw.normal()) * 1e-300}
        segments = (sampled, tool) if sample else (sampled,)
        responses.append(Response(sample, int(draw.integers(2**63)), segments, "stop", rewards))
    return Group(PROMPTS[number], draw.integers(0, 100, 9).astype(np.int32), tuple(responses))


def _bits(group: Group) -> object:
    segments = [
        [None if x is None else (x.dtype.str, x.shape, x.tobytes()) for x in (s.tokens, s.behaviour_logprobs,
         s.old_logprobs, s.weight_versions)] + [s.trained]
        for r in group.responses
        for s in r.segments
    ]  # fmt: skip
    others = [(r.sample, r.seed, r.finish_reason, {k: v.hex() for k, v in r.rewards.items()}) for r in group.responses]
    return group.prompt_id, group.prompt_tokens.dtype.str, group.prompt_tokens.tobytes(), segments, others


def _began(step: int = 1, updates: int = 2) -> Began:
    return Began(stage=1, step=step, version=7, prompt_ids=PROMPTS, num_samples=2, num_updates=updates)


def _written(folder: Path) -> Journal:
    journal = Journal(folder)
    journal.begin(_began())
    for number in (2, 0, 1):
        journal.append(_group(number))
    journal.sync()
    return journal


def test_a_step_comes_back_to_the_bit_with_what_was_trained(tmp_path: Path) -> None:
    journal = _written(tmp_path / "rollouts")
    found = read_step(journal.folder, 1, 1)
    assert found.began == _began() and found.generated and not found.finished
    assert [_bits(group) for group in found.groups] == [_bits(_group(number)) for number in (2, 0, 1)]
    assert [(t.prompt_id, t.sample) for t in found.trajectories] == [(p, s) for p in PROMPTS for s in (0, 1)]
    assert found.seeds[("b@0", 1)] == _group(1).responses[1].seed
    assert len(found.untrained) == 6

    journal.trained(Trained(1, 8, (("a@0", 0), ("a@0", 1), ("c@0", 0))))
    found = read_step(journal.folder, 1, 1)
    assert [(t.prompt_id, t.sample) for t in found.untrained] == [("b@0", 0), ("b@0", 1), ("c@0", 1)]
    assert not found.finished
    journal.trained(Trained(2, 9, (("b@0", 0), ("b@0", 1))))
    assert read_step(journal.folder, 1, 1).finished and read_step(journal.folder, 1, 1).trained[1].version == 9
    journal.begin(_began(step=2))
    assert steps(journal.folder) == [(1, 1), (1, 2)]
    assert not read_step(journal.folder, 1, 2).generated


def test_a_prompt_is_written_once_for_all_of_its_responses(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(_began())
    group = _group(0)
    responses = tuple(Response(s, s, group.responses[0].segments, "stop", {}) for s in range(8))
    place = journal.append(Group("a@0", np.zeros(100_000, np.int32), responses))
    assert place.length < 404_000


def test_groups_are_read_back_while_the_step_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(_began())
    places = [journal.append(_group(number)) for number in (0, 1)]
    journal.append(_group(2))
    assert [_bits(journal.read(place)) for place in reversed(places)] == [_bits(_group(1)), _bits(_group(0))]


def test_every_torn_tail_is_left_out_and_cut_off(tmp_path: Path) -> None:
    journal = _written(tmp_path)
    journal.close()
    path = segment_path(tmp_path, 1, 1)
    content = path.read_bytes()
    ends = [found for found in range(len(content)) if content.startswith(MAGIC, found)] + [len(content)]
    assert len(ends) == 5
    lengths = sorted(
        {*range(ends[1], len(content), 7), *(e + d for e in ends[1:-1] for d in (-1, 0, 1)), len(content) - 1}
    )
    for length in [length for length in lengths if length >= ends[1]]:
        path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends[1:])
        found = read_step(tmp_path, 1, 1)
        assert len(found.groups) == whole - 1 and found.torn_bytes == length - ends[whole]
        if found.torn_bytes == 0 and length < len(content):
            continue
        again = Journal(tmp_path)
        again.begin(_began())  # a step that is begun again counts from there
        assert again.cut_bytes == found.torn_bytes
        again.append(_group(1))
        again.close()
        found = read_step(tmp_path, 1, 1)
        assert (found.attempts, found.torn_bytes) == (2, 0)
        assert [_bits(group) for group in found.groups] == [_bits(_group(1))]
    for tail in (b"\0" * 300, content[ends[3] :][:-40] + b"\0" * 40):  # a file that grew before its bytes arrived
        path.write_bytes(content[: ends[3]] + tail)
        assert read_step(tmp_path, 1, 1).torn_bytes == len(tail)
    path.write_bytes(content[: ends[1] - 1])
    with pytest.raises(RolloutError, match="holds no whole record"):
        read_step(tmp_path, 1, 1)


def test_damage_before_the_end_is_never_passed_over(tmp_path: Path) -> None:
    _written(tmp_path).close()
    path = segment_path(tmp_path, 1, 1)
    content = bytearray(path.read_bytes())
    last = content.rfind(MAGIC)
    for at in range(0, last, 5):
        changed = bytearray(content)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        for look in (lambda: read_step(tmp_path, 1, 1), lambda: Journal(tmp_path).begin(_began())):
            with pytest.raises(RolloutError, match="is damaged, and there are whole ones after it"):
                look()
        assert path.read_bytes() == changed, "nothing was cut"
    second = content.find(MAGIC, 1)
    third = content.find(MAGIC, second + 1)
    path.write_bytes(content[:second] + content[third:])  # a record was left out
    with pytest.raises(RolloutError, match="record 1 of .* is damaged"):
        read_step(tmp_path, 1, 1)
    path.write_bytes(content[:third] + content[second:])  # one was repeated
    with pytest.raises(RolloutError, match="record 2 of .* is damaged"):
        read_step(tmp_path, 1, 1)


def test_a_full_disk_ends_the_writing_with_the_remedy_and_a_whole_file(tmp_path: Path) -> None:
    journal = _written(tmp_path)
    size = segment_path(tmp_path, 1, 1).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))  # the next record begins and does not end
    try:
        with pytest.raises(RolloutError, match=r"(?s)rollouts can't be written.*free space.*keep_rollouts"):
            journal.append(_group(0, length=100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert segment_path(tmp_path, 1, 1).stat().st_size == size
    found = read_step(tmp_path, 1, 1)
    assert len(found.groups) == 3 and found.torn_bytes == 0
    journal.append(_group(0))  # there is room again
    assert len(read_step(tmp_path, 1, 1).groups) == 4


def test_a_device_without_room_and_a_folder_that_is_a_file(tmp_path: Path) -> None:
    full = segment_path(tmp_path, 1, 1)
    os.symlink("/dev/full", full)
    with pytest.raises(RolloutError, match="No space left on device"):
        Journal(tmp_path).begin(_began())
    (tmp_path / "file").write_text("")
    with pytest.raises(RolloutError, match="file/01-000001.rollouts can't be written"):
        Journal(tmp_path / "file").begin(_began())


def test_the_last_steps_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep=2)
    (tmp_path / "notes.rollouts").write_text("of somebody else")
    for step in range(1, 6):
        journal.begin(_began(step=step))
    assert steps(tmp_path) == [(1, 4), (1, 5)]
    with pytest.raises(RolloutError, match="no rollouts were kept of step 3 of stage 1"):
        read_step(tmp_path, 1, 3)
    everything = Journal(tmp_path)
    for step in range(6, 9):
        everything.begin(_began(step=step))
    assert len(steps(tmp_path)) == 5
    assert (tmp_path / "notes.rollouts").exists()


def test_steps_that_a_run_takes_again_are_not_called_trained_any_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.begin(_began(step=step))
        journal.append(_group(0))
        if step < 3:
            journal.trained(Trained(1, step, (("p0", 0),)))
    journal.close()
    assert Journal(tmp_path).go_on((1, 2)) == 0, "the third was not trained"
    assert Journal(tmp_path).go_on((1, 1)) == 1
    assert Journal(tmp_path).go_on((1, 1)) == 0, "once"
    first, second = read_step(tmp_path, 1, 1), read_step(tmp_path, 1, 2)
    assert first.trained and not first.undone
    assert not second.trained and second.undone and len(second.groups) == 1
    again = Journal(tmp_path, keep=2)
    again.begin(_began(step=2))
    assert steps(tmp_path) == [(1, 1), (1, 2), (1, 3)], "later ones do not count among those that are kept"
    again.append(_group(0))
    again.trained(Trained(1, 2, (("p0", 0),)))
    found = read_step(tmp_path, 1, 2)
    assert found.attempts == 2 and [update.version for update in found.trained] == [2] and not found.undone
    assert Journal(tmp_path).go_on((0, -1)) == 2, "a run without a checkpoint begins from its start"

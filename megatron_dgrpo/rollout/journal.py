"""The trajectory journal: what was generated, scored and trained on, on the disk before it is used.

A step of a stage has a file of its own, `SS-NNNNNN.rollouts`, that is only appended to. Its records are frames of
`codec` (length, contents, checksum, the record's number in the file): nothing is pickled, and a record that was
damaged, left out or repeated is found. In their order they are

    Began     what is asked for, and the version of the weights that answer
    Further   prompts that are asked for as well, in the place of groups that are left out
    Group     a prompt's samples with their rewards, log-probs, versions and seeds, as soon as all have ended
    Trained   the samples that an update was made of, after that update
    Undone    the run went on from a checkpoint before this step: its updates are not in the weights any more

A step that is begun again gets another `Began` in the same file: what counts is what follows the last one. A run that
goes on marks all later steps as `Undone` before it trains, so that at any time the samples that files call trained are
those of the updates in the run's weights, each once.

Happens-before: a group is written before any rank sees it, and `sync` (fsync of file and folder) comes before each use;
`Trained` comes after its update and is synced as well. So a process that is killed loses nothing that was used, and a
machine that fails nothing that was used before. A record whose writing was cut short is a torn tail: the reader leaves
it out and says so, a writer that goes on cuts it off. A damaged record with whole ones after it is never passed over.

Only rank 0 writes, and every byte goes through `_put`. Rank 0 may have a thread that appends while another syncs,
reads back or records an update.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dgrpo import points
from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.rollout.codec import HEADER, MAGIC, decode, encode, frame_length, register
from megatron_dgrpo.rollout.messages import Group

SUFFIX = ".rollouts"
_LOOK_AHEAD = 64
"""A damaged record counts as damage, and not as a torn tail, if one of so many after it is whole."""

Sample = tuple[str, int]
"""A prompt's id and the number of the sample."""


@register
@dataclass(frozen=True)
class Began:
    stage: int
    step: int
    version: int  # of the weights that every token is to be sampled from
    prompt_ids: tuple[str, ...]
    num_samples: int  # of each prompt
    num_updates: int  # that the samples are for


@register
@dataclass(frozen=True)
class Further:
    prompt_ids: tuple[str, ...]


@register
@dataclass(frozen=True)
class Trained:
    update: int  # from 1
    version: int  # of the weights that it made
    samples: tuple[tuple[str, int], ...]


@register
@dataclass(frozen=True)
class Undone:
    stage: int
    step: int  # after which the run went on


@dataclass(frozen=True)
class Place:
    """Where a record is."""

    path: Path
    offset: int
    length: int
    sequence: int


# ---- reading ----


@dataclass(frozen=True)
class StepRollouts:
    """A step as its file has it, from its last beginning."""

    began: Began
    groups: list[Group]  # in the order in which they ended
    trained: list[Trained]
    attempts: int  # how often it was begun
    torn_bytes: int  # of a record at the end whose writing was cut short
    undone: bool = False  # the run went on from before it; no update counts

    @property
    def trajectories(self) -> list[Trajectory]:
        """Of the groups that are whole, in the order in which their prompts were asked for."""
        place = {prompt_id: number for number, prompt_id in enumerate(self.began.prompt_ids)}
        ordered = sorted(self.groups, key=lambda group: place[group.prompt_id])
        return [trajectory for group in ordered for trajectory in group.trajectories]

    @property
    def seeds(self) -> dict[Sample, int]:
        return {(group.prompt_id, r.sample): r.seed for group in self.groups for r in group.responses}

    @property
    def generated(self) -> bool:
        """Whether every sample that was asked for is there."""
        return len(self.groups) == len(self.began.prompt_ids)

    @property
    def finished(self) -> bool:
        """Whether every update was made."""
        return len(self.trained) == self.began.num_updates

    @property
    def untrained(self) -> list[Trajectory]:
        """Those that no update has used: all, some, or the ones that were too long."""
        used = {sample for update in self.trained for sample in update.samples}
        return [t for t in self.trajectories if (t.prompt_id, t.sample) not in used]


def steps(folder: str | Path) -> list[tuple[int, int]]:
    """(stage, step) of each file, in order."""
    found = []
    for path in Path(folder).glob(f"*{SUFFIX}"):
        stage, _, step = path.name.removesuffix(SUFFIX).partition("-")
        if stage.isdecimal() and step.isdecimal():
            found.append((int(stage), int(step)))
    return sorted(found)


def segment_path(folder: str | Path, stage: int, step: int) -> Path:
    return Path(folder) / f"{stage:02d}-{step:06d}{SUFFIX}"


def read_step(folder: str | Path, stage: int, step: int) -> StepRollouts:
    path = segment_path(folder, stage, step)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RolloutError(
            f"{path} can't be read ({error.strerror}): no rollouts were kept of step {step} of stage {stage}"
        ) from None
    records, end = _records(path, content)
    begun = [number for number, record in enumerate(records) if isinstance(record, Began)]
    if not begun:
        raise RolloutError(f"{path} holds no whole record: the run ended when the step began")
    after = records[begun[-1] + 1 :]
    began: Began = records[begun[-1]]
    further = [name for record in after if isinstance(record, Further) for name in record.prompt_ids]
    undone = any(isinstance(record, Undone) for record in after)
    return StepRollouts(
        began=replace(began, prompt_ids=(*began.prompt_ids, *further)),
        groups=[record for record in after if isinstance(record, Group)],
        trained=[] if undone else [record for record in after if isinstance(record, Trained)],
        attempts=len(begun),
        torn_bytes=len(content) - end,
        undone=undone,
    )


def _records(path: Path, content: bytes) -> tuple[list[Any], int]:
    """Every whole record, and where the last one ends."""
    records: list[Any] = []
    offset = 0
    while offset < len(content):
        record, length = _record(content, offset, len(records))
        if record is None:
            if _whole_record_after(content, offset + 1, len(records)):
                raise RolloutError(
                    f"record {len(records)} of {path} (at byte {offset}) is damaged, and there are whole ones after it:"
                    " the disk or a copy has changed it. Restore the file, or remove it to do without its step"
                )
            break
        records.append(record)
        offset += length
    return records, offset


def _record(content: bytes, offset: int, sequence: int) -> tuple[Any, int]:
    """The record that begins here and its length; (None, 0) where there is no whole one."""
    if offset + HEADER.size > len(content):
        return None, 0
    try:
        length = frame_length(content[offset : offset + HEADER.size])
        return decode(memoryview(content)[offset : offset + length], sequence=sequence), length
    except RolloutError:
        return None, 0


def _whole_record_after(content: bytes, start: int, sequence: int) -> bool:
    while (start := content.find(MAGIC, start)) >= 0:
        numbers = range(sequence + 1, sequence + _LOOK_AHEAD)
        if any(_record(content, start, number)[0] is not None for number in numbers):
            return True
        start += 1
    return False


# ---- writing ----


class Journal:
    """Rank 0's. With `keep`, beginning a step removes the files of all but the last so many."""

    def __init__(self, folder: str | Path, *, keep: int | None = None) -> None:
        self.folder, self._keep = Path(folder), keep
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._file = -1
        self._size = self._count = 0
        self.cut_bytes = 0
        """Of a torn tail that was there when the step's file was opened, and is gone."""

    def begin(self, began: Began) -> None:
        """Later records are of this step. Its file may be there already, from before."""
        path = segment_path(self.folder, began.stage, began.step)
        self._open(path)
        with self._saying_so(path):
            self._forget_old_steps((began.stage, began.step))
        self._put(began)
        self.sync()

    def go_on(self, after: tuple[int, int]) -> int:
        """The run goes on after this (stage, step): later ones are undone. Returns how many have been, of those that
        were trained."""
        count = 0
        for stage, step in steps(self.folder):
            if (stage, step) <= after:
                continue
            records = self._open(segment_path(self.folder, stage, step))
            last = next((record for record in reversed(records) if not isinstance(record, Group)), None)
            if isinstance(last, Trained):
                self._put(Undone(*after))
                self.sync()
                count += 1
        self.close()
        return count

    def _open(self, path: Path) -> list[Any]:
        """A step's file, to write on in it; the records that it has."""
        self.close()
        with self._saying_so(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = points.open_file("journal.open", path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            content = path.read_bytes() if os.fstat(self._file).st_size else b""
            records, self._size = _records(path, content)
            self._path, self._count, self.cut_bytes = path, len(records), len(content) - self._size
            if self.cut_bytes:
                points.cut("journal.torn", self._file, self._size)
        return records

    def append(self, group: Group) -> Place:
        return self._put(group)

    def further(self, further: Further) -> None:
        self._put(further)

    def trained(self, trained: Trained) -> None:
        self._put(trained)
        self.sync()

    def sync(self) -> None:
        """What was written so far survives the machine."""
        assert self._path is not None, "begin comes first"
        with self._saying_so(self._path):
            points.sync("journal.sync", self._file)
            points.sync_folder("journal.folder", self.folder)

    def read(self, place: Place) -> Group:
        """A group of the step that is being written."""
        assert place.path == self._path, "that step is over"
        group = decode(os.pread(self._file, place.length, place.offset), sequence=place.sequence)
        assert isinstance(group, Group)
        return group

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file, self._path = -1, None

    def _put(self, record: Any) -> Place:
        """A whole record, or none at all and an error."""
        with self._lock:
            path = self._path
            assert path is not None, "begin comes first"
            frame = encode(record, sequence=self._count)
            with self._saying_so(path):
                try:
                    points.write("journal.record", self._file, frame)
                except OSError:
                    with contextlib.suppress(OSError):
                        points.cut("journal.undo", self._file, self._size)
                    raise
            place = Place(path, self._size, len(frame), self._count)
            self._size += len(frame)
            self._count += 1
            return place

    def _forget_old_steps(self, now: tuple[int, int]) -> None:
        """Steps after this one may have files: of before the run went on from an earlier one."""
        if self._keep is None:
            return
        older = [name for name in steps(self.folder) if name < now]
        for name in older[: max(0, len(older) + 1 - self._keep)]:
            points.remove("journal.forget", segment_path(self.folder, *name))

    @contextlib.contextmanager
    def _saying_so(self, path: Path) -> Any:
        try:
            yield
        except OSError as error:
            raise RolloutError(
                f"the journal {path} can't be written ({error.strerror}). Nothing is trained on that is not in it, so "
                "the run ends: make it writable, or free space on that disk (keep_rollouts=N keeps the last N steps)"
            ) from error


def samples_of(trajectories: Sequence[Trajectory]) -> list[Sample]:
    return [(t.prompt_id, t.sample) for t in trajectories]

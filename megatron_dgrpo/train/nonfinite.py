"""Updates that are not finite: found before a weight changes, traced to a sample, and refused or left out.

Every rank finds the same in the same reduction: the count of bad loss rows, or the gradient's norm. So all of them come
here together, and what each knows of the cause is gathered on all of them.

A row that is not finite names its sample. Where all rows are finite and the gradient is not, the batch is gone through
again: micro-batch by micro-batch until the gradient of one is bad by itself, then with the weights of half of its
samples, and half of that, to the first sample whose gradient is bad alone. That costs up to two steps more, once. It
changes nothing but gradient buffers, which the next update clears. It finds nothing where only a sum overflows, and the
periodic schedule keeps no batch to go through: both are said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dgrpo.config.endings import SkipNonFinite
from megatron_dgrpo.config.schema import Stage
from megatron_dgrpo.errors import NonFiniteError, listing
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.student import Student
from megatron_dgrpo.train.update import Gradients, Work, backward, summarise

_NAMED = 8
"""Samples, and lines of a rank, that a message names at most."""


class Guard:
    """Of one stage's updates, on every rank of the student."""

    def __init__(self, run: Run, stage: Stage, number: int) -> None:
        self._run, self._number, self._settings = run, number, stage.on_nonfinite
        self._kind = run.config.stages[number].kind
        self._skipped = self._in_a_row = 0

    def state(self) -> dict[str, int]:
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, int]) -> None:
        self._skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    @property
    def facts(self) -> dict[str, float]:
        """For the update's record, where updates may be skipped."""
        return {"skipped_steps": float(self._skipped)} if isinstance(self._settings, SkipNonFinite) else {}

    @contextmanager
    def __call__(
        self, gradients: Gradients, works: Sequence[Work] | None, step: int, update: int = 1
    ) -> Iterator[None]:
        """Around the end of an update, from the whole gradient to the optimizer. `works` are what it was made of; None
        where that was not kept."""
        try:
            yield
        except NonFiniteError as error:
            self._refuse(str(error), gradients, works, f"stage {self._number} ({self._kind}), step {step}, ", update)
        else:
            self._in_a_row = 0

    def _refuse(self, what: str, gradients: Gradients, works: Sequence[Work] | None, where: str, update: int) -> None:
        student = self._run.trained
        causes = _causes(student, gradients, works)
        words = listing(f"{where}update {update}: {what}; no weight was changed:", causes)
        settings = self._settings
        if not isinstance(settings, SkipNonFinite):
            raise NonFiniteError(f"{words}\nLook at these samples, or lower the learning rate; {self._skip}") from None
        self._skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= settings.in_a_row:
            raise NonFiniteError(
                f"{words}\n{self._in_a_row} updates in a row were not finite "
                f"(stages.{self._number}.on_nonfinite.in_a_row): lower the learning rate, or go back to a checkpoint"
            ) from None
        student.skip()
        self._run.note(
            f"{words}\nThe update was skipped (skipped_steps {self._skipped}, {self._in_a_row} in a row)",
            kind="skipped_steps",
            level="warning",
        )

    @property
    def _skip(self) -> str:
        return f"stages.{self._number}.on_nonfinite=skip leaves such updates out"


def _causes(student: Student, gradients: Gradients, works: Sequence[Work] | None) -> list[str]:
    """What all ranks know, the same on each of them."""
    rows = _of_all_ranks(student, gradients.reports[:_NAMED])
    if rows:
        return rows
    parameters = _of_all_ranks(student, [", ".join(names)] if (names := student.bad_gradients()) else [])
    found = [f"the gradients of {words}, over what ranks have in their buffers" for words in parameters]
    if works is None:
        return [*found, "the sample was not looked for: the periodic schedule keeps no batch to go through again"]
    return [*found, find_samples(student, works)]


def find_samples(student: Student, works: Sequence[Work]) -> str:
    """Whose gradient is not finite though all loss rows are. A collective of the student's ranks; it leaves the
    gradient buffers in disorder."""
    rounds = student.decoder.groups.grid.pp if len(student.wrapped) > 1 else 1
    for work in works:
        work = replace(work, balance=False)
        summary = summarise(student, work)
        for first in range(0, len(work.layouts), rounds):
            part = replace(work, layouts=work.layouts[first : first + rounds])
            samples = _samples(student, part)
            if not _is_bad(student, part, summary, samples):
                continue
            guilty = _first_bad(lambda some, p=part, s=summary: _is_bad(student, p, s, some), samples)  # type: ignore[misc]
            names = [work.names[i] if work.names else f"sample {i}" for i in guilty[:_NAMED]]
            more = f" and {len(guilty) - _NAMED} more" if len(guilty) > _NAMED else ""
            if len(guilty) == 1:
                return f"{names[0]} is the first whose gradient alone is not finite"
            return f"only together the gradients of these are not finite: {', '.join(names)}{more}"
    return "no micro-batch's gradient is bad by itself: it is their sum, or its norm, that overflows"


def _first_bad(is_bad: Callable[[Sequence[int]], bool], samples: Sequence[int]) -> Sequence[int]:
    """Of samples that are bad together: the first that is so alone, or the fewest that this way of halving finds."""
    while len(samples) > 1:
        half = len(samples) // 2
        halves = (samples[:half], samples[half:])
        smaller = next((some for some in halves if is_bad(some)), None)
        if smaller is None:
            break
        samples = smaller
    return samples


def _samples(student: Student, part: Work) -> list[int]:
    """Those of these micro-batches on all ranks."""
    mine = {int(i) for layout in part.layouts for i in part.streams.sample_N[torch.from_numpy(layout.row_stream_R)]}
    return sorted({i for each in _gathered(student, sorted(mine)) for i in each})


def _is_bad(student: Student, part: Work, summary: Any, samples: Sequence[int]) -> bool:
    """Whether the gradient of these samples' rows is not finite on any rank."""
    streams = part.streams
    chosen_N = torch.isin(streams.sample_N, torch.tensor(samples, dtype=streams.sample_N.dtype))
    weights = {name: torch.where(chosen_N, w_N, torch.zeros_like(w_N)) for name, w_N in streams.weights.items()}
    student.zero_grad()
    backward(student, replace(part, streams=replace(streams, weights=weights)), summary, lambda *_: {})
    verdict = torch.tensor(float(bool(student.bad_gradients())), device=platform.device())
    dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=student.decoder.groups.world)
    return bool(verdict)


def _of_all_ranks(student: Student, lines: list[str]) -> list[str]:
    world = student.decoder.groups.world
    ranks = dist.get_process_group_ranks(world)
    found = zip(ranks, _gathered(student, lines), strict=True)
    return [f"rank {rank}: {line}" for rank, each in found for line in each]


def _gathered(student: Student, mine: Any) -> list[Any]:
    world = student.decoder.groups.world
    everyone: list[Any] = [None] * world.size()
    dist.all_gather_object(everyone, mine, group=world)
    return everyone

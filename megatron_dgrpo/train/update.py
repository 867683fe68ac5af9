"""One optimizer update: micro-batches through Megatron's schedule, heads and terms on their loss rows.

Legend: _R loss rows of a micro-batch, _N loss tokens of the batch.

The trainer knows no algorithm: it is given streams, a loss and its factors. The order of a micro-batch is hidden
states -> loss rows -> statistics -> terms -> a scalar whose backward goes the same way back. Megatron scales nothing:
its loss function reports 0 tokens, which makes the divisor 1, and `calculate_per_token_loss` turns its averages off.
A batch may come in parts: gradients are linear, so those of the parts add up, and a factor that is known only when all
of them are there (the number of its tokens, say) multiplies the sum.

Only the last stage of a pipeline has the head and sees loss rows. What it counted is handed to the other stages, so
that every rank reports the same and all of them stop when a row is not finite.

Terms that need their own token alone have their gradients formed while the logits exist. The others take two passes:
what they must know of the whole batch is summed first, without gradients, and the logits are made again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dgrpo.algorithms.diagnostics import (
    POSITION_EDGES,
    balance_values,
    by_position,
    gradient_balance,
    sign_disagreement,
)
from megatron_dgrpo.algorithms.losses import Evaluation, Loss, Summary, add_summaries, attach, nonfinite_report
from megatron_dgrpo.algorithms.metrics import Metric, mean_of, merge, pack, rescaled, unpack, values
from megatron_dgrpo.algorithms.mismatch import mismatch_metrics
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.errors import NonFiniteError
from megatron_dgrpo.heads import RowStatistics, gather_rows
from megatron_dgrpo.model.schedule import run_schedule
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.collectives import broadcast_figures
from megatron_dgrpo.train.rows import LossRows, Taught
from megatron_dgrpo.train.student import Student
from megatron_dgrpo.train.teachers import Lesson


@dataclass(frozen=True)
class Work:
    """What one update trains on: this rank's micro-batches, the whole batch's streams, the loss."""

    layouts: Sequence[Layout]
    streams: Streams
    loss: Loss
    factors: Mapping[str, float]
    temperature: float
    lessons: Sequence[Lesson] = ()  # what each teacher says of the batch
    head_options: Mapping[str, Any] = field(default_factory=dict)  # the JSD's alpha, the number of likeliest ids
    names: Sequence[str] = ()  # of the batch's samples, for errors
    balance: bool = False  # compare the gradients of the terms by the hidden states


class Gradients:
    """The gradient of one update, and what there is to say of it, out of one part of the batch or several.

    Parts add up in the gradient buffers. Nothing is reduced over ranks before `finish`.
    """

    def __init__(self, student: Student) -> None:
        student.zero_grad()
        self._student = student
        self._metrics: dict[str, Metric] = {}
        self._factors: Mapping[str, float] = {}
        self.reports: list[str] = []
        """This rank's loss rows that are not finite."""

    def add(self, work: Work) -> None:
        def look(rows: LossRows, evaluation: Evaluation, statistics: RowStatistics) -> dict[str, Metric]:
            self.reports.extend(nonfinite_report(evaluation, statistics, rows.streams, work.names))
            return _metrics(rows, work, evaluation, statistics)

        parts = backward(self._student, work, summarise(self._student, work), look)
        self._metrics = merge([self._metrics, *parts])
        self._factors = work.factors

    def finish(self, scale: float = 1.0) -> dict[str, float]:
        """Make the gradient whole, times `scale`. Returns the metrics of all parts, the same on every rank."""
        self._student.reduce_gradients(scale)
        metrics = _of_the_whole_batch(self._student, rescaled(self._metrics, scale))
        if metrics.get("nonfinite_rows"):
            raise NonFiniteError(f"{int(metrics['nonfinite_rows'])} loss rows are not finite")
        return balance_values(metrics) | {f"{name}/factor": float(factor) for name, factor in self._factors.items()}


Look = Callable[[LossRows, Evaluation, RowStatistics], dict[str, Metric]]


def backward(student: Student, work: Work, summary: Summary | None, look: Look) -> list[dict[str, Metric]]:
    """The gradients of a part of the batch, added to the buffers, and what `look` made of each micro-batch."""

    def loss_of(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, Metric]]:
        rows = loss_rows(student, hidden, layout, work)
        scalar, evaluation, statistics = _evaluate(rows, work, summary)
        return scalar, look(rows, evaluation, statistics)

    return run_schedule(student.decoder, student.wrapped, work.layouts, loss_of, forward_only=False)


def compute_gradients(student: Student, work: Work) -> dict[str, float]:
    """Fill the gradient buffers from a whole batch; returns its metrics, the same on every rank."""
    gradients = Gradients(student)
    gradients.add(work)
    return gradients.finish()


def old_logprobs(student: Student, work: Work) -> Streams:
    """The streams with the live weights' log-probs as old ones: of this rank's rows, on the last stage; else NaN."""
    old_N = torch.full((work.streams.num_tokens,), float("nan"), dtype=torch.float64)

    def keep(hidden: torch.Tensor, layout: Layout) -> None:
        statistics = loss_rows(student, hidden, layout, replace(work, lessons=())).score({"logprob"})
        old_N[torch.from_numpy(layout.row_stream_R)] = statistics.logprob_T.double().cpu()

    each_micro_batch(student, work.layouts, keep)
    return replace(work.streams, old_logprobs_N=old_N)


@torch.no_grad()
def each_micro_batch(student: Student, layouts: Sequence[Layout], look: Callable[[torch.Tensor, Layout], None]) -> None:
    """Show `look` the hidden states of each micro-batch, without gradients."""

    def loss_of(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, None]:
        look(hidden, layout)
        return torch.zeros((), device=hidden.device), None

    run_schedule(student.decoder, student.wrapped, layouts, loss_of, forward_only=True)


def summarise(student: Student, work: Work) -> Summary | None:
    """What the terms must know of the whole batch, if anything: summed over micro-batches, then over ranks."""
    if work.loss.needs == "token":
        return None
    parts: list[Summary] = []

    def keep(hidden: torch.Tensor, layout: Layout) -> None:
        rows = loss_rows(student, hidden, layout, work)
        parts.append(work.loss.summarise(rows.score(work.loss.statistics), rows.streams))

    each_micro_batch(student, work.layouts, keep)
    total = add_summaries(parts)
    for name in sorted(total):
        dist.all_reduce(total[name], group=student.decoder.groups.dp_cp)
    return total


def loss_rows(student: Student, hidden: torch.Tensor, layout: Layout, work: Work) -> LossRows:
    """The loss rows of a micro-batch whose hidden states are these."""
    where, decoder = platform.device(), student.decoder
    stream_R = torch.from_numpy(layout.row_stream_R)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    streams = work.streams.select(stream_R).to(where, wide)
    return LossRows(
        hidden_RH=gather_rows(
            hidden,
            torch.from_numpy(layout.row_hidden_R).to(where),
            group=decoder.groups.tp,
            sequence_parallel=decoder.config.sequence_parallel,
        ),
        targets_R=torch.from_numpy(layout.row_target_R).to(where),
        streams=streams,
        head=decoder.head(),
        temperature=work.temperature,
        group=decoder.groups.tp,
        taught=tuple(_taught(lesson, i, stream_R.to(where), streams) for i, lesson in enumerate(work.lessons)),
        options=work.head_options,
    )


def _taught(lesson: Lesson, number: int, stream_R: torch.Tensor, streams: Streams) -> Taught:
    """The rows of the `number`th teacher; all rows, where there is no choice."""
    assert lesson.rows is not None and lesson.head is not None
    every_R = torch.arange(len(stream_R), device=stream_R.device)
    index_S = every_R if streams.teacher_N is None else every_R[streams.teacher_N == number]
    return Taught(index_S, lesson.rows.select(stream_R[index_S]), lesson.head)


def _wanted(work: Work) -> set[str]:
    """What the terms read, and what is worth seeing and costs next to nothing beside it."""
    want = {"entropy", *work.loss.statistics}
    if work.lessons:
        want |= {"kl", "teacher_logprob"}
    for support in ("student", "teacher"):
        if any(name.startswith(f"kl_topk_{support}") for name in want):
            want |= {f"topk_{support}_mass"}
    return want


def _evaluate(rows: LossRows, work: Work, summary: Summary | None) -> tuple[torch.Tensor, Evaluation, RowStatistics]:
    """The scalar to call backward on, with the true loss as its value."""
    want, loss = _wanted(work), work.loss
    if loss.needs != "token":
        statistics = rows.score(want)
        evaluation = loss.evaluate(statistics, rows.streams, work.factors, summary)
        return attach(evaluation, statistics), evaluation, statistics

    def coefficients(some: RowStatistics, at: slice | torch.Tensor) -> Mapping[str, torch.Tensor]:
        return loss.evaluate(some, rows.streams.select(at), work.factors).coefficients

    statistics, carrier = rows.score_with_gradients(want, coefficients)
    evaluation = loss.evaluate(statistics, rows.streams, work.factors)
    return evaluation.loss.to(carrier.dtype) + carrier, evaluation, statistics


def _metrics(rows: LossRows, work: Work, evaluation: Evaluation, statistics: RowStatistics) -> dict[str, Metric]:
    metrics = [evaluation.metrics, by_position(evaluation, statistics, rows.streams)]
    metrics.append(sign_disagreement(evaluation, statistics))
    metrics.append(mismatch_metrics(statistics.logprob_T, rows.streams, POSITION_EDGES))
    metrics.append(_by_teacher(rows, work, statistics))
    if work.balance:
        metrics.append(gradient_balance(evaluation, rows.hidden_gradient(_wanted(work))))
    return merge(metrics)


def _by_teacher(rows: LossRows, work: Work, statistics: RowStatistics) -> dict[str, Metric]:
    """The mean KL to each of several teachers, over the loss tokens that are its own."""
    if len(work.lessons) < 2:
        return {}
    assert statistics.kl_T is not None and rows.streams.teacher_N is not None
    owner_R = rows.streams.teacher_N
    return {f"kl/{lesson.name}": mean_of(statistics.kl_T, owner_R == i) for i, lesson in enumerate(work.lessons)}


def _of_the_whole_batch(student: Student, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Exact figures: sums and maxima over the data-parallel ranks of the last stage, the same on every rank."""
    groups = student.decoder.groups
    found: dict[str, float] | None = None
    if groups.grid.last_stage:
        sums, maxima = (vector.to(platform.device()) for vector in pack(metrics))
        dist.all_reduce(sums, group=groups.dp_cp)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=groups.dp_cp)
        found = values(unpack(metrics, sums.cpu(), maxima.cpu()))
    return broadcast_figures(found, group=groups.pp, source=groups.grid.pp - 1)

"""One optimizer update: micro-batches through Megatron's schedule, heads and terms on their loss rows.

Legend: _R loss rows of a micro-batch, _N loss tokens of the batch.

The trainer knows no algorithm: it is given streams, a loss and its factors. The order of a micro-batch is hidden
states -> loss rows -> statistics -> terms -> a scalar whose backward goes the same way back. Megatron scales nothing:
its loss function reports 0 tokens, which makes the divisor 1, and `calculate_per_token_loss` turns its averages off.

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
from megatron_dgrpo.algorithms.metrics import Metric, merge, pack, unpack, values
from megatron_dgrpo.algorithms.mismatch import mismatch_metrics
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.errors import NonFiniteError, listing
from megatron_dgrpo.heads import HeadShard, RowStatistics, gather_rows
from megatron_dgrpo.model.schedule import run_schedule
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.collectives import broadcast_figures
from megatron_dgrpo.teacher.rows import TeacherRows
from megatron_dgrpo.train.rows import LossRows
from megatron_dgrpo.train.student import Student


@dataclass(frozen=True)
class Work:
    """What one update trains on: this rank's micro-batches, the whole batch's streams, the loss."""

    layouts: Sequence[Layout]
    streams: Streams
    loss: Loss
    factors: Mapping[str, float]
    temperature: float
    teacher_head: HeadShard | None = None
    teacher_rows: TeacherRows | None = None
    head_options: Mapping[str, Any] = field(default_factory=dict)  # the JSD's alpha, the number of likeliest ids
    balance: bool = False  # compare the gradients of the terms by the hidden states


def compute_gradients(student: Student, work: Work) -> dict[str, float]:
    """Fill the gradient buffers; returns the metrics of the whole batch, the same on every rank."""
    student.zero_grad()
    summary = _summary(student, work) if work.loss.needs != "token" else None
    reports: list[str] = []

    def loss_of(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, Metric]]:
        rows = loss_rows(student, hidden, layout, work)
        scalar, evaluation, statistics = _evaluate(rows, work, summary)
        reports.extend(nonfinite_report(evaluation, statistics, rows.streams))
        return scalar, _metrics(rows, work, evaluation, statistics)

    parts = run_schedule(student.decoder, student.wrapped, work.layouts, loss_of, forward_only=False)
    metrics = _of_the_whole_batch(student, parts)
    if metrics.get("nonfinite_rows"):
        raise NonFiniteError(
            listing(
                f"{int(metrics['nonfinite_rows'])} loss rows are not finite; no weight was changed. On this rank:",
                reports or ["none: see the other ranks' logs"],
            )
        )
    return balance_values(metrics) | {f"{name}/factor": float(factor) for name, factor in work.factors.items()}


def old_logprobs(student: Student, work: Work) -> Streams:
    """The streams with the live weights' log-probs as old ones: of this rank's rows, on the last stage; else NaN."""
    old_N = torch.full((work.streams.num_tokens,), float("nan"), dtype=torch.float64)

    def keep(hidden: torch.Tensor, layout: Layout) -> None:
        statistics = loss_rows(student, hidden, layout, replace(work, teacher_rows=None)).score({"logprob"})
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


def _summary(student: Student, work: Work) -> Summary:
    """What the terms must know of the whole batch: summed over micro-batches, then over ranks."""
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
    return LossRows(
        hidden_RH=gather_rows(
            hidden,
            torch.from_numpy(layout.row_hidden_R).to(where),
            group=decoder.groups.tp,
            sequence_parallel=decoder.config.sequence_parallel,
        ),
        targets_R=torch.from_numpy(layout.row_target_R).to(where),
        streams=work.streams.select(stream_R).to(where, wide),
        head=decoder.head(),
        temperature=work.temperature,
        group=decoder.groups.tp,
        teacher_RH=work.teacher_rows.select(stream_R.to(where)) if work.teacher_rows is not None else None,
        teacher_head=work.teacher_head,
        options=work.head_options,
    )


def _wanted(work: Work) -> set[str]:
    """What the terms read, and what is worth seeing and costs next to nothing beside it."""
    want = {"entropy", *work.loss.statistics}
    if work.teacher_rows is not None:
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

    def coefficients(some: RowStatistics, at: slice) -> Mapping[str, torch.Tensor]:
        return loss.evaluate(some, rows.streams.select(at), work.factors).coefficients

    statistics, carrier = rows.score_with_gradients(want, coefficients)
    evaluation = loss.evaluate(statistics, rows.streams, work.factors)
    return evaluation.loss.to(carrier.dtype) + carrier, evaluation, statistics


def _metrics(rows: LossRows, work: Work, evaluation: Evaluation, statistics: RowStatistics) -> dict[str, Metric]:
    metrics = [evaluation.metrics, by_position(evaluation, statistics, rows.streams)]
    metrics.append(sign_disagreement(evaluation, statistics))
    metrics.append(mismatch_metrics(statistics.logprob_T, rows.streams, POSITION_EDGES))
    if work.balance:
        metrics.append(gradient_balance(evaluation, rows.hidden_gradient(_wanted(work))))
    return merge(metrics)


def _of_the_whole_batch(student: Student, parts: Sequence[Mapping[str, Metric]]) -> dict[str, float]:
    """Exact figures: sums and maxima over the data-parallel ranks of the last stage, the same on every rank."""
    groups = student.decoder.groups
    found: dict[str, float] | None = None
    if groups.grid.last_stage:
        metrics = merge(parts)
        sums, maxima = (vector.to(platform.device()) for vector in pack(metrics))
        dist.all_reduce(sums, group=groups.dp_cp)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=groups.dp_cp)
        found = values(unpack(metrics, sums.cpu(), maxima.cpu()))
    return broadcast_figures(found, group=groups.pp, source=groups.grid.pp - 1)

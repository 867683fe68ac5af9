"""One optimizer update: micro-batches through Megatron's schedule, heads and terms on their loss rows.

Legend: _R loss rows of a micro-batch, _N loss tokens of the batch.

The trainer knows no algorithm: it is given streams, a loss and its factors. The order of a micro-batch is hidden
states -> loss rows -> statistics -> terms -> a scalar whose backward goes the same way back. Megatron scales nothing:
its loss function reports 0 tokens, which makes the divisor 1, and `calculate_per_token_loss` turns its averages off.

Only the last stage of a pipeline has the head and sees loss rows. What it counted is handed to the other stages, so
that every rank reports the same and all of them stop when a row is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_dgrpo.algorithms.losses import Loss, attach, nonfinite_report
from megatron_dgrpo.algorithms.metrics import Metric, merge, pack, unpack, values
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.errors import NonFiniteError, listing
from megatron_dgrpo.heads import HeadShard, RowStatistics, gather_rows, row_statistics
from megatron_dgrpo.model.schedule import run_schedule
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.collectives import broadcast_figures
from megatron_dgrpo.teacher.rows import TeacherRows
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


def compute_gradients(student: Student, work: Work) -> dict[str, float]:
    """Fill the gradient buffers; returns the metrics of the whole batch, the same on every rank."""
    student.zero_grad()
    want = {"entropy", *work.loss.statistics}
    reports: list[str] = []

    def loss_of(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, Metric]]:
        statistics, streams = _statistics(student, hidden, layout, work, want)
        evaluation = work.loss.evaluate(statistics, streams, work.factors)
        reports.extend(nonfinite_report(evaluation, statistics, streams))
        return attach(evaluation, statistics), dict(evaluation.metrics)

    parts = run_schedule(student.decoder, student.wrapped, work.layouts, loss_of, forward_only=False)
    metrics = _of_the_whole_batch(student, parts)
    if metrics.get("nonfinite_rows"):
        raise NonFiniteError(
            listing(
                f"{int(metrics['nonfinite_rows'])} loss rows are not finite; no weight was changed. On this rank:",
                reports or ["none: see the other ranks' logs"],
            )
        )
    return metrics


@torch.no_grad()
def old_logprobs(student: Student, work: Work) -> Streams:
    """The streams with the log-probs of the live weights as the old ones (of this rank's rows, on the last stage; NaN elsewhere)."""
    old_N = torch.full((work.streams.num_tokens,), float("nan"), dtype=torch.float64)

    def keep(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, None]:
        statistics, _ = _statistics(student, hidden, layout, replace(work, teacher_rows=None), {"logprob"})
        old_N[torch.from_numpy(layout.row_stream_R)] = statistics.logprob_T.double().cpu()
        return torch.zeros((), device=hidden.device), None

    run_schedule(student.decoder, student.wrapped, work.layouts, keep, forward_only=True)
    return replace(work.streams, old_logprobs_N=old_N)


def _statistics(
    student: Student, hidden: torch.Tensor, layout: Layout, work: Work, want: set[str]
) -> tuple[RowStatistics, Streams]:
    """What the heads say of a micro-batch's loss rows, and the streams of those rows."""
    where, decoder = platform.device(), student.decoder
    stream_R = torch.from_numpy(layout.row_stream_R)
    rows_RH = gather_rows(
        hidden,
        torch.from_numpy(layout.row_hidden_R).to(where),
        group=decoder.groups.tp,
        sequence_parallel=decoder.config.sequence_parallel,
    )
    teacher_RH = work.teacher_rows.select(stream_R.to(where)) if work.teacher_rows is not None else None
    statistics = row_statistics(
        rows_RH,
        decoder.head(),
        torch.from_numpy(layout.row_target_R).to(where),
        temperature=work.temperature,
        group=decoder.groups.tp,
        teacher_hidden_TH=teacher_RH,
        teacher_head=work.teacher_head if teacher_RH is not None else None,
        want=want,
        nonfinite="keep",  # counted, reduced over all ranks, and refused by all of them together
    )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return statistics, work.streams.select(stream_R).to(where, wide)


def _of_the_whole_batch(student: Student, parts: Sequence[Mapping[str, Metric]]) -> dict[str, float]:
    """Exact figures: sums and maxima over the data-parallel ranks of the last stage, the same on every rank."""
    groups = student.decoder.groups
    found: dict[str, float] | None = None
    if groups.grid.last_stage:
        metrics = merge(parts)
        sums, maxima = (vector.to(platform.device()) for vector in pack(metrics))
        dist.all_reduce(sums, group=groups.dp_cp)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=groups.dp_cp)
        found = values(unpack(metrics, sums, maxima))
    return broadcast_figures(found, group=groups.pp, source=groups.grid.pp - 1)

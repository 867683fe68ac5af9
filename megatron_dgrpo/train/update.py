"""One optimizer update: micro-batches through Megatron's schedule, heads and terms on their loss rows.

Legend: _R loss rows of a micro-batch, _N loss tokens of the batch.

The trainer knows no algorithm: it is given streams, a loss and its factors. The order of a micro-batch is hidden
states -> loss rows -> statistics -> terms -> a scalar whose backward goes the same way back. Megatron scales nothing:
its loss function reports 0 tokens, which makes the divisor 1, and `calculate_per_token_loss` turns its averages off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dgrpo.algorithms.losses import Loss, attach, nonfinite_report
from megatron_dgrpo.algorithms.metrics import Metric, merge, pack, unpack, values
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.errors import NonFiniteError, listing
from megatron_dgrpo.heads import HeadShard, RowStatistics, gather_rows, row_statistics
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
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

    def loss_of(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
        statistics, streams = _statistics(student, hidden, layout, work, want)
        evaluation = work.loss.evaluate(statistics, streams, work.factors)
        reports.extend(nonfinite_report(evaluation, statistics, streams))
        return (
            attach(evaluation, statistics),
            torch.zeros((), dtype=torch.int32, device=hidden.device),
            dict(evaluation.metrics),
        )

    parts = _run(student, work.layouts, loss_of, forward_only=False)
    metrics = _reduce(student, merge(parts))
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
    """The streams with the log-probs of the live weights as the old ones (of this rank's rows; NaN elsewhere)."""
    old_N = torch.full((work.streams.num_tokens,), float("nan"), dtype=torch.float64)

    def keep(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
        statistics, _ = _statistics(student, hidden, layout, replace(work, teacher_rows=None), {"logprob"})
        old_N[torch.from_numpy(layout.row_stream_R)] = statistics.logprob_T.double().cpu()
        zero = torch.zeros((), device=hidden.device)
        return zero, zero.int(), {}

    _run(student, work.layouts, keep, forward_only=True)
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


def _run(student: Student, layouts: Sequence[Layout], loss_of: Any, *, forward_only: bool) -> list[dict[str, Metric]]:
    """All micro-batches through Megatron's schedule; what `loss_of` reported of each."""

    def forward_step(batches: Iterator[Layout], model: Any) -> tuple[torch.Tensor, Any]:
        layout = next(batches)
        return model(layout), lambda hidden: loss_of(hidden, layout)

    schedule = get_forward_backward_func(pp_size=student.decoder.groups.grid.pp, vp_size=None)
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter(layouts),
        model=[student.wrapped],
        num_microbatches=len(layouts),
        seq_length=max(layout.num_tokens for layout in layouts),
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=student.decoder.groups.collection,
    )


def _reduce(student: Student, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Exact figures of the whole batch: sums and maxima over the data-parallel ranks."""
    sums, maxima = (vector.to(platform.device()) for vector in pack(metrics))
    dist.all_reduce(sums, group=student.decoder.groups.dp_cp)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=student.decoder.groups.dp_cp)
    return values(unpack(metrics, sums, maxima))

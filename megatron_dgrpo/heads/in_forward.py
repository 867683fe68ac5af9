"""Statistics and gradients in one walk: *gradient in forward* mode.

A loss whose terms need only their own token has its coefficients (d loss / d statistic of a row) as soon as the row's
statistics are merged. So each chunk's logits of the whole vocabulary shard are kept until its coefficients are known
and their gradients formed: the logits are made once instead of twice. Backward only multiplies by a number.

It takes two collectives per chunk (and what the JSD and top-k take beside them), one reduction of the hidden gradient
at the end, a chunk x vocabulary of memory, and a float32 copy of the head's gradient until backward.

Legend: _T rows, _C rows of a chunk, _V rows of a head on this rank, _H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.heads.backward import HiddenGradient, backward_sweep
from megatron_dgrpo.heads.forward import Checks
from megatron_dgrpo.heads.results import DIFFERENTIABLE, RowStatistics
from megatron_dgrpo.heads.shard import HeadShard, Pair
from megatron_dgrpo.heads.statistics import Call, OnNonFinite, evaluate, make_call, make_pair
from megatron_dgrpo.heads.sweep import Plan, Sweep, Workspace, spans
from megatron_dgrpo.heads.weight_gradient import WeightGradient

Coefficients = Callable[[RowStatistics, slice], Mapping[str, Tensor]]
"""From the statistics of some rows to d loss / d statistic, by name. The same on every rank of the group."""


def row_statistics_with_gradients(
    hidden_TH: Tensor,
    head: HeadShard,
    targets_T: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    coefficients: Coefficients,
    teacher_hidden_TH: Tensor | None = None,
    teacher_head: HeadShard | None = None,
    want: Collection[str] = ("logprob", "entropy", "kl"),
    jsd_alpha: float = 0.5,
    topk: int = 128,
    chunk_rows: int | None = None,
    tile: int | None = None,
    nonfinite: OnNonFinite = "raise",
) -> tuple[RowStatistics, Tensor]:
    """The statistics, without gradients of their own, and a scalar 0 to be added to the loss.

    The scalar's backward hands over the gradients of sum_T coefficient x statistic, times what arrives at the scalar:
    the loss may be scaled after this. It can be called once. Without gradient mode no gradient is formed.
    """
    pair = make_pair(hidden_TH, head, teacher_hidden_TH, teacher_head)
    pair.check(targets_T, temperature)
    call = make_call(want, pair, temperature, group, jsd_alpha, topk, nonfinite)
    plan = Plan.keep(pair, chunk_rows, tile)
    form = torch.is_grad_enabled()
    carrier, *values = _InForward.apply(hidden_TH, head.weight_VH, pair, targets_T, call, plan, coefficients, form)
    return RowStatistics.of(dict(zip(call.names, values, strict=True))), carrier


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        pair: Pair,
        targets_T: Tensor,
        call: Call,
        plan: Plan,
        coefficients: Coefficients,
        form: bool,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_weight = (form and needed for needed in ctx.needs_input_grad[:2])
        hidden = HiddenGradient(hidden_TH, pair.dtype, group=call.group) if needs_hidden else None
        weight = WeightGradient(weight_VH, pair.dtype, apart=True) if needs_weight else None
        values = _walk(pair, targets_T, call, plan, coefficients, hidden, weight)
        ctx.hidden_TH, ctx.weight = None if hidden is None else hidden.finish(), weight
        ctx.save_for_backward(weight_VH)
        ctx.mark_non_differentiable(*values)
        return hidden_TH.new_zeros((), dtype=pair.dtype), *values

    @staticmethod
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight_VH,) = ctx.saved_tensors
        hidden_TH, weight = ctx.hidden_TH, ctx.weight
        ctx.hidden_TH = ctx.weight = None
        if hidden_TH is None and weight is None:
            raise ObjectiveError("gradients formed in forward are handed over once: build the loss again")
        hidden_grad_TH = None if hidden_TH is None else hidden_TH.mul_(factor.to(hidden_TH.dtype))
        weight_grad_VH = None if weight is None else weight.finish(weight_VH, factor.to(weight.sum_VH.dtype))
        return hidden_grad_TH, weight_grad_VH, None, None, None, None, None, None


def _walk(
    pair: Pair,
    targets_T: Tensor,
    call: Call,
    plan: Plan,
    coefficients: Coefficients,
    hidden: HiddenGradient | None,
    weight: WeightGradient | None,
) -> list[Tensor]:
    """Chunk by chunk: statistics, coefficients, gradients. Returns the statistics of all rows, in the call's order."""
    workspace = Workspace(pair.device)
    parts: list[dict[str, Tensor]] = []
    checks: list[Checks] = []
    for rows in spans(0, pair.num_rows, plan.chunk_rows):
        sweep = Sweep(pair.rows(rows.slice), call.temperature, plan, workspace, keep=True)
        values, facts, topk, check = evaluate(sweep, targets_T[rows.slice], call)
        parts.append(values)
        checks.append(check)
        upstream = _upstream(coefficients(RowStatistics.of(values), rows.slice), values, pair)
        if hidden is not None or weight is not None:
            backward_sweep(sweep, targets_T[rows.slice], facts, topk, upstream, hidden, weight, first_row=rows.start)
    if call.nonfinite == "raise" and checks:
        Checks.cat(checks).raise_if_bad(targets_T, pair)
    empty = torch.empty(0, dtype=pair.dtype, device=pair.device)
    return [torch.cat([part[name] for part in parts]) if parts else empty.clone() for name in call.names]


def _upstream(given: Mapping[str, Tensor], values: Mapping[str, Tensor], pair: Pair) -> dict[str, Tensor]:
    wrong = sorted(name for name in given if name not in DIFFERENTIABLE or name not in values)
    if wrong:
        raise ObjectiveError(
            f"coefficients for {', '.join(wrong)}: they belong to differentiable statistics that were asked for,"
            f" here {', '.join(name for name in values if name in DIFFERENTIABLE)}"
        )
    return {name: coefficient_C.to(pair.dtype) for name, coefficient_C in given.items()}

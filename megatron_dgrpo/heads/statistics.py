"""Statistics of each loss row under a vocabulary-parallel head, with exact gradients: *recompute* mode.

Forward makes the logits tile by tile, keeps a handful of numbers per row, and merges them over the group: one MAX and
one SUM, whatever the number of rows. Backward makes the logits again, chunk by chunk, and turns any upstream gradients
of the differentiable statistics into those of hidden states and head. Nothing of size rows x vocabulary ever exists.

Beyond these two collectives the JSD takes one more SUM, and everything top-k one gather of the shards' candidates.

Legend: _T rows, _V rows of a head on this rank, _H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.heads.backward import HiddenGradient, backward_sweep
from megatron_dgrpo.heads.forward import Checks, finish, forward_sums
from megatron_dgrpo.heads.jsd import check_alpha, jsd
from megatron_dgrpo.heads.logit_gradient import RowFacts
from megatron_dgrpo.heads.results import DIFFERENTIABLE, RowStatistics, outputs
from megatron_dgrpo.heads.shard import HeadShard, Pair, Side
from megatron_dgrpo.heads.sweep import Plan, Sweep
from megatron_dgrpo.heads.topk import TopK, TopKFacts
from megatron_dgrpo.heads.weight_gradient import WeightGradient

OnNonFinite = Literal["raise", "keep"]


@dataclass(frozen=True)
class Call:
    """What is asked for, beside tensors."""

    names: tuple[str, ...]
    temperature: float
    group: dist.ProcessGroup | None
    jsd_alpha: float
    topk: int
    nonfinite: OnNonFinite
    reduce_hidden_gradient: bool = True


def row_statistics(
    hidden_TH: Tensor,
    head: HeadShard,
    targets_T: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    teacher_hidden_TH: Tensor | None = None,
    teacher_head: HeadShard | None = None,
    want: Collection[str] = ("logprob", "entropy", "kl"),
    jsd_alpha: float = 0.5,
    topk: int = 128,
    chunk_rows: int | None = None,
    tile: int | None = None,
    nonfinite: OnNonFinite = "raise",
    reduce_hidden_gradient: bool = True,
) -> RowStatistics:
    """Statistics `want` of each row; the differentiable ones have gradients to `hidden_TH` and `head.weight_VH`.

    `hidden_TH`, `targets_T` and the teacher's hidden states are the same on all ranks of `group`, and so is the
    gradient of `hidden_TH`; without `reduce_hidden_gradient` it is this rank's part of the sum.

    `nonfinite="raise"` raises on every rank of the group when a row is NaN or infinite or a target outside the
    vocabulary (on CUDA it waits for the device). "keep" leaves such a row's statistics NaN, for a caller that counts
    them over more ranks than this group's before any rank stops.
    """
    pair = make_pair(hidden_TH, head, teacher_hidden_TH, teacher_head)
    pair.check(targets_T, temperature)
    call = make_call(want, pair, temperature, group, jsd_alpha, topk, nonfinite, reduce_hidden_gradient)
    plan = Plan.recompute(pair, chunk_rows, tile)
    values = _Recompute.apply(hidden_TH, head.weight_VH, pair, targets_T, call, plan)
    return RowStatistics.of(dict(zip(call.names, values, strict=True)))


def make_pair(
    hidden_TH: Tensor, head: HeadShard, teacher_hidden_TH: Tensor | None, teacher_head: HeadShard | None
) -> Pair:
    if teacher_hidden_TH is None and teacher_head is None:
        return Pair(Side(hidden_TH, head), None)
    if teacher_hidden_TH is None or teacher_head is None:
        raise ObjectiveError("a teacher is its hidden states and its head: give both or neither")
    return Pair(Side(hidden_TH, head), Side(teacher_hidden_TH.detach(), teacher_head))


def make_call(
    want: Collection[str],
    pair: Pair,
    temperature: float,
    group: dist.ProcessGroup | None,
    jsd_alpha: float,
    topk: int,
    nonfinite: OnNonFinite,
    reduce_hidden_gradient: bool = True,
) -> Call:
    names = outputs(want, pair.teacher is not None)
    if "jsd" in names:
        check_alpha(jsd_alpha)
    if topk < 1:
        raise ObjectiveError(f"topk is {topk}: the number of likeliest ids is at least 1")
    return Call(names, temperature, group, jsd_alpha, topk, nonfinite, reduce_hidden_gradient)


def evaluate(
    sweep: Sweep, targets_T: Tensor, call: Call
) -> tuple[dict[str, Tensor], RowFacts, TopKFacts | None, Checks]:
    """All statistics of a sweep's rows, and what their gradients need."""
    topk = TopK.wanted(call.names, call.topk, sweep.pair)
    sums = forward_sums(sweep, targets_T, call.names, topk, group=call.group)
    values, facts, checks = finish(sums, call.names, sweep.pair.teacher is not None)
    topk_facts = None
    if topk is not None:
        assert facts.shared_lse_T is not None and facts.teacher_lse_T is not None
        topk.merge(group=call.group)
        topk_facts = topk.finish(facts.shared_lse_T, facts.teacher_lse_T, values)
    if "jsd" in call.names:
        assert facts.shared_lse_T is not None and facts.teacher_lse_T is not None
        lse_T, teacher_lse_T, facts.jsd_alpha = facts.shared_lse_T, facts.teacher_lse_T, call.jsd_alpha
        values["jsd"], facts.jsd_student_T = jsd(sweep, lse_T, teacher_lse_T, call.jsd_alpha, group=call.group)
    return {name: values[name] for name in call.names}, facts, topk_facts, checks


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, pair: Pair, targets_T: Tensor, call: Call, plan: Plan
    ) -> tuple[Tensor, ...]:
        values, facts, topk, checks = evaluate(Sweep(pair, call.temperature, plan), targets_T, call)
        if call.nonfinite == "raise":
            checks.raise_if_bad(targets_T, pair)
        ctx.save_for_backward(hidden_TH, weight_VH)
        ctx.pair, ctx.targets_T, ctx.call, ctx.plan, ctx.facts, ctx.topk = pair, targets_T, call, plan, facts, topk
        ctx.set_materialize_grads(False)
        values = {name: value_T.detach() for name, value_T in values.items()}  # ctx keeping an output would leak both
        ctx.mark_non_differentiable(*(value_T for name, value_T in values.items() if name not in DIFFERENTIABLE))
        return tuple(values.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TH, weight_VH = ctx.saved_tensors  # raises where an optimizer has changed them since forward
        call, pair = ctx.call, ctx.pair
        upstream = {
            name: grad_T.to(pair.dtype) for name, grad_T in zip(call.names, grads, strict=True) if grad_T is not None
        }
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        group = call.group if call.reduce_hidden_gradient else None
        hidden = HiddenGradient(hidden_TH, pair.dtype, group=group) if needs_hidden else None
        weight = WeightGradient(weight_VH, pair.dtype) if needs_weight else None
        if upstream:
            sweep = Sweep(pair, call.temperature, ctx.plan)
            backward_sweep(sweep, ctx.targets_T, ctx.facts, ctx.topk, upstream, hidden, weight)
        hidden_grad_TH = None if hidden is None else hidden.finish()
        return hidden_grad_TH, None if weight is None else weight.finish(weight_VH), None, None, None, None

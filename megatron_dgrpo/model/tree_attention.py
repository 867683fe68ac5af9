"""Exact attention over trees, from blocks that are each one call of a flash operator.

A query of a response sees the prompt (in full) and its own response (causally): two blocks, in two calls. Softmax over
both follows from the blocks' outputs and log-sum-exps:

    lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Backward hands each block the merged out and lse, and adds up (see `attention_ops`). So a prompt's keys and values are
read once for all responses, nothing of the size tokens x tokens exists, and no mask does. Which blocks there are is the
layout record's business (`AttentionPlan`).

Under context parallelism some keys are on other ranks. They come in pieces: while one piece is computed with, the next
is on its way. What came is not kept for backward, where it comes again, and its gradients go back to its owner in a
reduce-scatter that overlaps with the next piece. Keys and values travel rather than queries, since a prompt's own
queries need them on every rank anyway, and responses then find them there. All ranks of the group make the same
collectives in the same order, also a rank that has no use for a piece.

Legend: S tokens on this rank, N query heads, K key-value heads, D head dimension, C ranks of the context-parallel
group, W tokens of a piece's window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.model import attention_ops
from megatron_dgrpo.packing.layout import AttentionPlan, Call, Piece, Span


def tree_attention(
    q_SND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    plan: AttentionPlan,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float,
) -> Tensor:
    """Output [S, N, D]; 0 for tokens that are in no call, which only pad. The group is the context-parallel one."""
    assert not plan.pieces or group is not None
    return _TreeAttention.apply(q_SND, k_SKD, v_SKD, plan, group, scale)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, group: dist.ProcessGroup | None, scale: float
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out_SND = q.new_zeros(q.shape, dtype=wide)
        lse_NS = q.new_zeros(q.shape[1], q.shape[0], dtype=wide)
        for call in plan.calls:
            _merge(out_SND, lse_NS, call, *_forward(q, k, v, call, scale))
        for piece, k_CWKD, v_CWKD in _travelling(k, v, plan.pieces, group):
            for rank, call in piece.calls:
                _merge(out_SND, lse_NS, call, *_forward(q, k_CWKD[rank], v_CWKD[rank], call, scale))
        out = out_SND.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse_NS)
        ctx.plan, ctx.group, ctx.scale = plan, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        wide = lse.dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
        for call in plan.calls:
            _add((dq, dk, dv), call, _backward(grad, q, k, v, out, lse, call, ctx.scale))
        returning: tuple[Piece, Tensor, dist.Work] | None = None
        for piece, k_CWKD, v_CWKD in _travelling(k, v, plan.pieces, ctx.group):
            grads_CWKE = k.new_zeros(*k_CWKD.shape[:-1], 2 * k.shape[-1], dtype=wide)
            for rank, call in piece.calls:
                parts = _backward(grad, q, k_CWKD[rank], v_CWKD[rank], out, lse, call, ctx.scale)
                _add((dq, *grads_CWKE[rank].chunk(2, -1)), call, parts)
            _take(returning, dk, dv)
            returning = (piece, *_send_back(grads_CWKE.to(k.dtype), ctx.group))
        _take(returning, dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


# ---- One call --------------------------------------------------------------------------------------------------------


def _parts(x_SND: Tensor, span: Span, count: int) -> Tensor:
    """Some tokens as [count, heads, tokens, D], a view."""
    return x_SND[span.slice].unflatten(0, (count, -1)).transpose(1, 2)


def _rows(x_NS: Tensor, span: Span, count: int) -> Tensor:
    """The same of one number per head and token, as [count, heads, tokens]."""
    return x_NS[:, span.slice].unflatten(1, (count, -1)).transpose(0, 1)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    n = call.count
    queries, keys, values = _parts(q, call.query, n), _parts(k, call.key, n), _parts(v, call.key, n)
    return attention_ops.forward(queries, keys, values, causal=call.causal, scale=scale)


def _merge(out_SND: Tensor, lse_NS: Tensor, call: Call, part_BNQD: Tensor, part_BNQ: Tensor) -> None:
    """Into what is known of the call's queries so far. Causal calls come first, and know nothing before them."""
    out, lse = _parts(out_SND, call.query, call.count), _rows(lse_NS, call.query, call.count)
    if call.causal:
        out.copy_(part_BNQD)
        lse.copy_(part_BNQ)
        return
    both = torch.logaddexp(lse, part_BNQ)
    out.mul_((lse - both).exp_()[..., None])
    out.addcmul_(part_BNQD.to(out.dtype), (part_BNQ - both).exp_()[..., None])
    lse.copy_(both)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = call.count
    return attention_ops.backward(
        _parts(grad, call.query, n),
        _parts(q, call.query, n),
        _parts(k, call.key, n),
        _parts(v, call.key, n),
        _parts(out, call.query, n),
        _rows(lse, call.query, n),
        causal=call.causal,
        scale=scale,
    )


def _add(sums: tuple[Tensor, ...], call: Call, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    for total, span, part in zip(sums, (call.query, call.key, call.key), parts, strict=True):
        _parts(total, span, call.count).add_(part)


# ---- Pieces ----------------------------------------------------------------------------------------------------------


def _travelling(
    k: Tensor, v: Tensor, pieces: tuple[Piece, ...], group: dist.ProcessGroup | None
) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Each piece with its keys and values of all ranks; the next one is under way meanwhile."""
    coming = _send(k, v, pieces[0], group) if pieces else None
    for number, piece in enumerate(pieces):
        assert coming is not None
        both_CWKE, work = coming
        work.wait()
        coming = _send(k, v, pieces[number + 1], group) if number + 1 < len(pieces) else None
        k_CWKD, v_CWKD = both_CWKE.chunk(2, -1)
        yield piece, k_CWKD, v_CWKD


def _send(k: Tensor, v: Tensor, piece: Piece, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.Work]:
    assert group is not None
    window = piece.window
    mine = window.overlap(Span(0, len(k))).slice
    own = k.new_zeros(window.length, k.shape[1], 2 * k.shape[2])
    torch.cat([k[mine], v[mine]], -1, out=own[: mine.stop - mine.start])
    everyone = k.new_empty(group.size(), *own.shape)
    work = dist.all_gather_into_tensor(everyone.flatten(0, 1), own, group=group, async_op=True)
    return everyone, work


def _send_back(grads_CWKE: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    own = torch.empty_like(grads_CWKE[0])
    work = dist.reduce_scatter_tensor(own, grads_CWKE.flatten(0, 1), group=group, async_op=True)
    return own, work


def _take(returning: tuple[Piece, Tensor, dist.Work] | None, dk: Tensor, dv: Tensor) -> None:
    """A piece's gradients, summed over the ranks that used it, to the keys and values that they belong to."""
    if returning is None:
        return
    piece, own_WKE, work = returning
    work.wait()
    mine = piece.window.overlap(Span(0, len(dk)))
    for total, part in zip((dk, dv), own_WKE[: mine.length].chunk(2, -1), strict=True):
        total[mine.slice] += part

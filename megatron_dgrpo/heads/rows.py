"""Loss rows out of a model's final hidden states, for the heads.

Only loss rows are ever multiplied with a head. Under sequence parallelism every rank holds its own part of the sequence
while the heads need every loss row on every rank: one all-reduce, in which each row comes from the one rank that has it
and zeros from the others, which is exact and, unlike a gather, takes any number of rows from each rank.

Backward has no collective. The heads hand back the gradient *summed* over the group (the one reduction of the hidden
rows' gradient is in `row_statistics`, in float32), so each rank keeps the rows that are its own. The caller must not
reduce again.

Legend: _R loss rows, s tokens of the micro-batch, H hidden size; hidden states are [s, 1, H], or [s / tp, 1, H] under
sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.errors import ObjectiveError


def gather_rows(
    hidden: Tensor, row_index_R: Tensor, *, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """The hidden states of some tokens, `[R, H]`, the same on every rank of the group."""
    if hidden.dim() != 3 or hidden.shape[1] != 1:
        raise ObjectiveError(f"hidden states have shape {tuple(hidden.shape)}: give them as [tokens, 1, hidden size]")
    scattered = sequence_parallel and group is not None and group.size() > 1
    return _GatherRows.apply(hidden, row_index_R, group if scattered else None)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, row_index_R: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.shape = hidden.shape
        if group is None:
            ctx.save_for_backward(row_index_R)
            ctx.scattered = False
            return hidden[:, 0].index_select(0, row_index_R)
        tokens, _, size = hidden.shape
        local_R = row_index_R - group.rank() * tokens
        own_R = ((local_R >= 0) & (local_R < tokens)).nonzero()[:, 0]
        local_O = local_R[own_R]
        ctx.save_for_backward(local_O, own_R)
        ctx.scattered = True
        rows_RH = hidden.new_zeros(len(row_index_R), size)
        rows_RH[own_R] = hidden[local_O, 0]
        if len(row_index_R):
            dist.all_reduce(rows_RH, group=group)
        return rows_RH

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.scattered:
            place_R, own_R = ctx.saved_tensors
            grad_RH = grad_RH[own_R]
        else:
            (place_R,) = ctx.saved_tensors
        grad = grad_RH.new_zeros(ctx.shape)
        # The last token of a prompt is a loss row of every response: its gradients are added up in float32.
        place_U, part_R = place_R.unique(return_inverse=True)
        wide = torch.promote_types(grad_RH.dtype, torch.float32)
        sum_UH = grad_RH.new_zeros(len(place_U), ctx.shape[-1], dtype=wide).index_add_(0, part_R, grad_RH.to(wide))
        grad[place_U, 0] = sum_UH.to(grad.dtype)
        return grad, None, None

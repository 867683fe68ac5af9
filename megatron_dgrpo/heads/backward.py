"""The walk of backward: logits again, their gradient, and its two products.

The gradient of the hidden states is complete: each rank's part, over its own columns, is summed over the group here, in
the statistics' type, in the one collective of backward. Hidden states are the same on all ranks and so is their
gradient; the caller reduces nothing.

Legend: _T rows, _C rows of a chunk, _V columns of a tile or rows of the head, _H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.heads import elementwise, products
from megatron_dgrpo.heads.logit_gradient import Entries, RowFacts, shared_slopes, student_only_slopes
from megatron_dgrpo.heads.sweep import Chunk, Span, Sweep
from megatron_dgrpo.heads.topk import TopKFacts
from megatron_dgrpo.heads.weight_gradient import WeightGradient


class HiddenGradient:
    """A chunk's sum over the vocabulary is formed in the statistics' type and rounded once.

    With several shards the rows stay in that type until they are summed: parts of a gradient cancel between shards.
    """

    def __init__(self, hidden_TH: Tensor, dtype: torch.dtype, *, group: dist.ProcessGroup | None) -> None:
        self.dtype, self.type_of_hidden = dtype, hidden_TH.dtype
        self.group = group if group is not None and group.size() > 1 else None
        kept = hidden_TH.dtype if self.group is None else dtype
        self.grad_TH = torch.zeros(hidden_TH.shape, dtype=kept, device=hidden_TH.device)

    def enter(self, rows: slice) -> Tensor:
        own_CH = self.grad_TH[rows]
        return own_CH if self.grad_TH.dtype == self.dtype else torch.zeros_like(own_CH, dtype=self.dtype)

    def leave(self, rows: slice, sum_CH: Tensor) -> None:
        if self.grad_TH.dtype != self.dtype:
            self.grad_TH[rows] = sum_CH

    def finish(self) -> Tensor:
        if self.group is not None and self.grad_TH.shape[0]:
            dist.all_reduce(self.grad_TH, group=self.group)
        return self.grad_TH.to(self.type_of_hidden)


def backward_sweep(
    sweep: Sweep,
    targets_T: Tensor,
    facts: RowFacts,
    topk: TopKFacts | None,
    upstream: Mapping[str, Tensor],
    hidden: HiddenGradient | None,
    weight: WeightGradient | None,
    first_row: int = 0,
) -> None:
    """Add the gradients of these rows' statistics times `upstream`; `first_row` is their place in `hidden`."""
    upstream = {name: c_T * sweep.scale for name, c_T in upstream.items()}
    topk_T, more = topk.gradient(upstream) if topk is not None else (None, [])
    shared, student_only = shared_slopes(facts, upstream, topk_T), student_only_slopes(facts, upstream)
    entries = Entries.of(targets_T, upstream.get("logprob"), more)
    start = sweep.pair.student.head.start
    for chunk in sweep.chunks():
        at, place = chunk.rows.slice, slice(first_row + chunk.rows.start, first_row + chunk.rows.stop)
        sum_CH = hidden.enter(place) if hidden is not None else None
        for tiles, slopes in ((sweep.shared_tiles(), shared), (sweep.student_only_tiles(), student_only)):
            slopes_C = slopes.rows(at)
            for columns in tiles:
                a_CV = chunk.student_logits(columns)
                b_CV = chunk.teacher_logits(columns) if slopes.needs_teacher else None
                here = None if entries is None else entries.tile(chunk.rows, columns, start)
                dtype = chunk.student_hidden().dtype
                grad_CV = elementwise.tile_gradient(a_CV, b_CV, slopes_C, here, sweep.scratch(a_CV), dtype)
                _add_products(chunk, columns, grad_CV, sum_CH, weight)
        if hidden is not None and sum_CH is not None:
            hidden.leave(place, sum_CH)


def _add_products(
    chunk: Chunk, columns: Span, grad_CV: Tensor, sum_CH: Tensor | None, weight: WeightGradient | None
) -> None:
    if sum_CH is not None:
        products.add_product(sum_CH, grad_CV, chunk.sweep.pair.student.head.weight_VH[columns.slice])
    if weight is not None:
        products.add_product(weight.sum_VH[columns.slice], grad_CV.t(), chunk.student_hidden())

"""Where a head's weight gradient goes.

Megatron's data-parallel wrapper gives every parameter a `main_grad`, a view into its gradient buffer, and a hook that
runs when autograd has the parameter's gradient: it adds `param.grad` to `main_grad` unless `grad_added_to_main_grad`
says that this has been done, drops `param.grad`, and starts the reduction of the parameter's bucket once all of the
bucket's hooks have run. Under overlapped reduction it insists that `param.grad` is there.

So the chunks' products are added straight into `main_grad`, autograd gets None, and `param.grad` is a placeholder of
one element's memory. A tied head is the embedding, too: there the hook gets the embedding's own gradient from autograd,
and Megatron's `zero_out_wgrad` makes it add that. A placeholder would be in its way.

Without `main_grad` the sum is autograd's to have, formed in float32 and rounded once.

Legend: _V rows of the head, padding included, _H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """The sum over chunks. Rows that nothing is added to (padding) stay as they are.

    With `apart` it is kept out of `main_grad` until `finish` knows the factor.
    """

    def __init__(self, weight_VH: Tensor, dtype: torch.dtype, apart: bool = False) -> None:
        main_VH: Tensor | None = getattr(weight_VH, "main_grad", None)
        if main_VH is not None and main_VH.dtype == dtype and not apart:
            self.sum_VH = main_VH
        else:
            self.sum_VH = torch.zeros(weight_VH.shape, dtype=dtype, device=weight_VH.device)

    def finish(self, weight_VH: Tensor, factor: Tensor | None = None) -> Tensor | None:
        """Hand the sum, times the factor, to `main_grad`, or return it for autograd."""
        main_VH: Tensor | None = getattr(weight_VH, "main_grad", None)
        if main_VH is None:
            if factor is not None:
                self.sum_VH.mul_(factor)
            return self.sum_VH.to(weight_VH.dtype)
        if factor is not None:
            main_VH.addcmul_(self.sum_VH, factor)
        elif self.sum_VH is not main_VH:
            main_VH.add_(self.sum_VH)
        if hasattr(weight_VH, "grad_added_to_main_grad"):
            weight_VH.grad_added_to_main_grad = True
            if not getattr(weight_VH, "zero_out_wgrad", False) and weight_VH.grad is None:
                weight_VH.grad = weight_VH.new_zeros(()).expand_as(weight_VH)
        return None

"""The matrix products of a chunk, accumulated in float32 (float64 for float64) whatever the inputs' type.

On CUDA the half types go to the tensor cores with a float32 result. Elsewhere they are widened first, which is exact,
and multiplied in float32.

Legend: _C rows of a chunk, _V columns of a vocabulary tile, _H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def native(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x can be multiplied in its own type with the result in `dtype`."""
    return x.dtype == dtype or x.is_cuda


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if native(x, dtype) else x.to(dtype)


def logits(out_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, scale: float) -> Tensor:
    """scale x hidden x weight^T into `out_CV`. `hidden_CH` has been through `operand`."""
    weight_VH = operand(weight_VH, out_CV.dtype)
    if hidden_CH.dtype == out_CV.dtype:
        return torch.addmm(out_CV, hidden_CH, weight_VH.t(), beta=0, alpha=scale, out=out_CV)
    return _addmm_wide(out_CV, hidden_CH, weight_VH.t(), beta=0, alpha=scale)


def add_product(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """sum += left x right, in the sum's type."""
    right_KN = operand(right_KN, sum_MN.dtype)
    if left_MK.dtype == sum_MN.dtype == right_KN.dtype:
        sum_MN.addmm_(left_MK, right_KN)
    else:
        _addmm_wide(sum_MN, left_MK, right_KN, beta=1, alpha=1)


def _addmm_wide(out: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> Tensor:
    return torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, beta=beta, alpha=alpha, out=out)

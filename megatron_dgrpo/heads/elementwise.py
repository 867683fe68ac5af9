"""The element-wise work on a tile of logits: PyTorch everywhere, one pass of a Triton kernel on CUDA.

Both do the same arithmetic (`running.add_tile`, `logit_gradient.tile_gradient` say which). The kernels leave out the
JSD and float64: these go through PyTorch on any device.

Legend: _C rows of a chunk, _V columns of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from megatron_dgrpo.heads import logit_gradient, running
from megatron_dgrpo.heads.logit_gradient import Entries, Slopes
from megatron_dgrpo.heads.sweep import Scratch


@cache
def _has_triton() -> bool:
    try:
        import triton  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return False
    return True


def _by_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float32 and _has_triton()


def add_tile(state: Mapping[str, Tensor], a_CV: Tensor | None, b_CV: Tensor | None, scratch: Scratch) -> None:
    """One tile into the running statistics. The logits stay."""
    like = a_CV if a_CV is not None else b_CV
    assert like is not None
    if _by_kernel(like):
        from megatron_dgrpo.heads import kernels

        kernels.add_tile(state, a_CV, b_CV)
    else:
        running.add_tile(state, a_CV, b_CV, scratch)


def tile_gradient(
    a_CV: Tensor,
    b_CV: Tensor | None,
    slopes: Slopes,
    entries: Entries | None,
    scratch: Scratch,
    product_dtype: torch.dtype,
) -> Tensor:
    """dL/da of a tile, handed over in the type of the products that follow.

    Everything is summed before it is rounded to that type: the target's entry nearly cancels p_y c_lp at a token that
    the student is sure of.
    """
    if _by_kernel(a_CV) and slopes.by_jsd_T is None:
        from megatron_dgrpo.heads import kernels

        if entries is None or entries.id_TK.shape[1] == 1:
            return kernels.tile_gradient(a_CV, b_CV, slopes, entries, product_dtype)
        grad_CV = kernels.tile_gradient(a_CV, b_CV, slopes, None, torch.float32)
    else:
        grad_CV = logit_gradient.tile_gradient(a_CV, b_CV, slopes, scratch)
    if entries is not None:
        entries.add_to(grad_CV)
    return grad_CV.to(product_dtype)

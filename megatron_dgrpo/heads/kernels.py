"""One Triton program per row for each of the two element-wise jobs: a tile into the statistics, a tile's gradient.

Both models' logits are read once, in float32, and nothing else of a tile's size is touched but the gradient, written in
the type of the products that follow. What is computed stands in `running.add_tile` and `logit_gradient.tile_gradient`.
A kernel's state is kept in registers while it goes along its row, so the recurrences run per block instead of per tile.

Legend: _C rows of a chunk, _V columns of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from megatron_dgrpo.heads.logit_gradient import Entries, Slopes

_STATISTICS_BLOCK = 2048
_GRADIENT_BLOCK = 2048


@triton.jit
def _add_tile_kernel(
    a_ptr, b_ptr, m_ptr, n_ptr, s_ptr, u_ptr, st_ptr, d_ptr, f_ptr, columns, a_stride, b_stride,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, WITH_U: tl.constexpr, WITH_D: tl.constexpr, WITH_F: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    m, n, s, u, st, d, f = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if HAS_A:
        m, s = tl.load(m_ptr + row), tl.load(s_ptr + row)
    if HAS_B:
        n, st = tl.load(n_ptr + row), tl.load(st_ptr + row)
    if WITH_U:
        u = tl.load(u_ptr + row)
    if WITH_D:
        d = tl.load(d_ptr + row)
    if WITH_F:
        f = tl.load(f_ptr + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        dm, dn = 0.0, 0.0
        a = tl.zeros([BLOCK], dtype=tl.float32)
        b = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_A:
            raw_a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0)
            new_m = tl.maximum(m, tl.max(tl.where(inside, raw_a, m), 0))
            dm = m - new_m
            m = new_m
            a = raw_a - m
        if HAS_B:
            raw_b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0)
            new_n = tl.maximum(n, tl.max(tl.where(inside, raw_b, n), 0))
            dn = n - new_n
            n = new_n
            b = raw_b - n
        if WITH_D:
            d = tl.exp(dm) * (d + s * (dm - dn))
        if WITH_F:
            f = tl.exp(dn) * (f + st * (dn - dm))
        if WITH_U:
            u = tl.exp(dm) * (u + s * dm)
        if HAS_A:
            ea = tl.where(inside, tl.exp(a), 0.0)
            s = tl.exp(dm) * s + tl.sum(ea, 0)
            if WITH_U:
                u += tl.sum(ea * a, 0)
        if HAS_B:
            eb = tl.where(inside, tl.exp(b), 0.0)
            st = tl.exp(dn) * st + tl.sum(eb, 0)
            if HAS_A:
                gap = (raw_a - raw_b) - (m - n)
                if WITH_D:
                    d += tl.sum(ea * gap, 0)
                if WITH_F:
                    f -= tl.sum(eb * gap, 0)
    if HAS_A:
        tl.store(m_ptr + row, m)
        tl.store(s_ptr + row, s)
    if HAS_B:
        tl.store(n_ptr + row, n)
        tl.store(st_ptr + row, st)
    if WITH_U:
        tl.store(u_ptr + row, u)
    if WITH_D:
        tl.store(d_ptr + row, d)
    if WITH_F:
        tl.store(f_ptr + row, f)


@triton.jit
def _tile_gradient_kernel(
    a_ptr, b_ptr, out_ptr, norm_ptr, k_ptr, by_logit_ptr, by_gap_ptr, by_teacher_ptr, teacher_lse_ptr, place_ptr,
    value_ptr, columns, a_stride, b_stride, out_stride,
    BY_LOGIT: tl.constexpr, BY_GAP: tl.constexpr, BY_TEACHER: tl.constexpr, ENTRY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    norm, k = tl.load(norm_ptr + row), tl.load(k_ptr + row)
    by_logit, by_gap, by_teacher, teacher_lse, place, value = 0.0, 0.0, 0.0, 0.0, 0, 0.0
    if BY_LOGIT:
        by_logit = tl.load(by_logit_ptr + row)
    if BY_GAP:
        by_gap = tl.load(by_gap_ptr + row)
    if BY_TEACHER:
        by_teacher, teacher_lse = tl.load(by_teacher_ptr + row), tl.load(teacher_lse_ptr + row)
    if ENTRY:
        place, value = tl.load(place_ptr + row), tl.load(value_ptr + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0)
        bracket = tl.zeros([BLOCK], dtype=tl.float32) + k
        if BY_LOGIT:
            bracket += by_logit * a
        if BY_GAP or BY_TEACHER:
            b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0)
            if BY_GAP:
                bracket += by_gap * (a - b)
        grad = tl.exp(a - norm) * bracket
        if BY_TEACHER:
            grad -= by_teacher * tl.exp(b - teacher_lse)
        if ENTRY:
            grad += tl.where(column == place, value, 0.0)
        tl.store(out_ptr + row * out_stride + column, grad.to(out_ptr.dtype.element_ty), mask=inside)


def add_tile(state: Mapping[str, Tensor], a_CV: Tensor | None, b_CV: Tensor | None) -> None:
    """`running.add_tile`; the state's tensors are contiguous."""
    like = a_CV if a_CV is not None else b_CV
    assert like is not None
    rows, columns = like.shape
    a, b = (x if x is not None else like for x in (a_CV, b_CV))
    absent = next(iter(state.values()))
    pointers = [state.get(name, absent) for name in ("m", "n", "S", "U", "St", "D", "F")]
    _add_tile_kernel[(rows,)](
        a, b, *pointers, columns, a.stride(0), b.stride(0),
        HAS_A=a_CV is not None, HAS_B=b_CV is not None, WITH_U="U" in state, WITH_D="D" in state, WITH_F="F" in state,
        BLOCK=min(_STATISTICS_BLOCK, triton.next_power_of_2(columns)),
        num_warps=8,
    )  # fmt: skip


def tile_gradient(
    a_CV: Tensor, b_CV: Tensor | None, slopes: Slopes, target: Entries | None, dtype: torch.dtype
) -> Tensor:
    """`logit_gradient.tile_gradient` with at most one entry per row, in `dtype`; float32 is written over the logits."""
    rows, columns = a_CV.shape
    out_CV = a_CV if dtype == a_CV.dtype else torch.empty(rows, columns, dtype=dtype, device=a_CV.device)
    b = b_CV if b_CV is not None else a_CV
    optional = [slopes.by_logit_T, slopes.by_gap_T, slopes.by_teacher_T, slopes.teacher_lse_T]
    place, value = (None, None) if target is None else (target.id_TK[:, 0], target.value_TK[:, 0])
    pointers = [x.contiguous() if x is not None else slopes.norm_T for x in (*optional, place, value)]
    _tile_gradient_kernel[(rows,)](
        a_CV, b, out_CV, slopes.norm_T, slopes.k_T, *pointers, columns, a_CV.stride(0), b.stride(0), out_CV.stride(0),
        BY_LOGIT=slopes.by_logit_T is not None, BY_GAP=slopes.by_gap_T is not None,
        BY_TEACHER=slopes.by_teacher_T is not None, ENTRY=target is not None,
        BLOCK=min(_GRADIENT_BLOCK, triton.next_power_of_2(columns)),
        num_warps=8,
    )  # fmt: skip
    return out_CV

"""One block of attention, as an operator that gives its log-sum-exp and takes it back.

    forward(q, k, v)                  -> out, lse        lse[n, q] = log sum over the block's keys of exp(scale q.k)
    backward(grad, q, k, v, out, lse) -> dq, dk, dv

Backward forms p = exp(scale q.k - lse) and ds = p (dp - grad.out) per pair. With the out and lse of *all* keys that a
query sees in place of the block's own, p is the true probability of each pair, so that blocks can be handed back one
by one and their gradients added up.

Three backends: torch's flash operator for CPU (every floating type), torch's flash operator for CUDA (bfloat16,
float16, heads up to 256 wide), and plain products over blocks of queries for whatever those two don't take.

Legend: B parts that see nothing of each other, N query heads, K key-value heads (N is a multiple of K; no head is
repeated), Q queries, T keys, D head dimension. Nothing may be empty: the flash operator for CPU dies of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024
"""Queries of a block in the plain backend."""


def forward(q_BNQD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, Q, D] and log-sum-exp [B, N, Q]."""
    match _backend(q_BNQD):
        case "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BNQD, k_BKTD, v_BKTD, 0.0, causal, scale=scale
            )
        case "cuda":
            q, k, v = (x.transpose(1, 2) for x in (q_BNQD, k_BKTD, v_BKTD))
            out, lse, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
            )
            return out.transpose(1, 2), lse
    return _plain_forward(q_BNQD, k_BKTD, v_BKTD, causal, scale)


def backward(
    grad_BNQD: Tensor,
    q_BNQD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BNQD: Tensor,
    lse_BNQ: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values through this block."""
    match _backend(q_BNQD):
        case "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_BNQD, q_BNQD, k_BKTD, v_BKTD, out_BNQD, lse_BNQ, 0.0, causal, scale=scale
            )
        case "cuda":
            grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BNQD, q_BNQD, k_BKTD, v_BKTD, out_BNQD))
            no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)  # a state that is not read
            grads = torch.ops.aten._flash_attention_backward(
                grad.contiguous(), q, k, v, out, lse_BNQ.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
                no_dropout, no_dropout.new_empty(0), scale=scale,
            )  # fmt: skip
            return tuple(x.transpose(1, 2) for x in grads)  # type: ignore[return-value]
    return _plain_backward(grad_BNQD, q_BNQD, k_BKTD, v_BKTD, out_BNQD, lse_BNQ, causal, scale)


def _backend(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    flash = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
    return "cuda" if flash else "plain"


def _scores(q_BNQD: Tensor, k_BKTD: Tensor, first: int, causal: bool, scale: float) -> Tensor:
    """Logits [B, K, N / K, Q, T] of some queries, of which the first is number `first`, in float32 at least."""
    wide = torch.promote_types(q_BNQD.dtype, torch.float32)
    groups = q_BNQD.to(wide).unflatten(1, (k_BKTD.shape[1], -1))
    scores = groups @ k_BKTD.to(wide)[:, :, None].transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(first + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for first in range(0, q.shape[2], _BLOCK):
        scores = _scores(q[:, :, first : first + _BLOCK], k, first, causal, scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp_() @ v.to(scores.dtype)[:, :, None]
        outs.append(out.flatten(1, 2).to(q.dtype))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_kv = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv, dqs = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide), []
    for first in range(0, q.shape[2], _BLOCK):
        span = slice(first, first + _BLOCK)
        group = lambda x, s=span: x[:, :, s].to(wide).unflatten(1, (num_kv, -1))  # noqa: E731
        p = (_scores(q[:, :, span], k, first, causal, scale) - group(lse[..., None])).exp_()
        g = group(grad)
        dv += (p.transpose(-1, -2) @ g).sum(2)
        ds = p * (g @ v.to(wide)[:, :, None].transpose(-1, -2) - (g * group(out)).sum(-1, keepdim=True)) * scale
        dqs.append((ds @ k.to(wide)[:, :, None]).flatten(1, 2).to(q.dtype))
        dk += (ds.transpose(-1, -2) @ group(q)).sum(2)
    return torch.cat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype)

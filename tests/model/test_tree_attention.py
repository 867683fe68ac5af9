"""Tree attention against a dense mask that is made from what tokens are, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dgrpo.model import attention_ops
from megatron_dgrpo.model.tree_attention import tree_attention
from megatron_dgrpo.packing.cost import Cost
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trees import Run, Tree
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import relative_error

SCALE = 0.3
CASES = {
    "one-token responses": [(5, [1, 3, 1, 7])],
    "several groups": [(9, [4, 4, 4]), (3, [2]), (14, [5, 1, 1, 8])],
    "G=1": [(6, [3])],
    "documents": [(4, []), (4, []), (7, []), (1, [])],
    "prompts of a token": [(1, [1]), (1, [2, 1]), (2, [9])],
    "long": [(70, [33, 21, 40])],
}


def _trees(sizes) -> list[Tree]:
    run = lambda n, stream: Run("x", np.arange(n), np.arange(n if stream is None else 0, n), stream or 0)  # noqa: E731
    return [
        Tree(run(p, None if rs else i), tuple(run(r, i) for r in rs)) for i, (p, rs) in enumerate(sizes)
    ]  # in order, by their stream indices


def _inputs(sizes, heads: int, kv: int, dtype=torch.float64, dim: int = 8):
    total = sum(p + sum(rs) for p, rs in sizes)
    draw = torch.Generator().manual_seed(0)
    shapes = [(total, heads, dim), (total, kv, dim), (total, kv, dim), (total, heads, dim)]
    return [torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def _dense(sizes, q, k, v, upstream):
    """Outputs and gradients of queries, keys and values."""
    kinds = []  # (tree, branch, position)
    for t, (p, rs) in enumerate(sizes):
        kinds += [(t, -1, i) for i in range(p)]
        kinds += [(t, b, p + i) for b, r in enumerate(rs) for i in range(r)]
    sees = lambda x, y: x[0] == y[0] and y[1] in (-1, x[1]) and y[2] <= x[2]  # noqa: E731
    mask = torch.tensor([[sees(x, y) for y in kinds] for x in kinds])
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    copies = q.shape[1] // k.shape[1]
    scores = torch.einsum("qnd,knd->nqk", q, k.repeat_interleave(copies, 1)) * SCALE
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    out = torch.einsum("nqk,knd->qnd", weights, v.repeat_interleave(copies, 1))
    return out.detach(), torch.autograd.grad((out * upstream).sum(), (q, k, v))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (3, 1), (2, 2)])
def test_output_and_gradients_equal_a_dense_mask(case: str, heads: int, kv: int) -> None:
    sizes = CASES[case]
    q, k, v, upstream = _inputs(sizes, heads, kv)
    expected, gradients = _dense(sizes, q, k, v, upstream)
    (layout,) = Packing(4096, multiple_of=8).micro_batches(_trees(sizes))
    pad = lambda x: torch.cat([x, x.new_full((layout.num_padding, *x.shape[1:]), 3.0)])  # noqa: E731
    q, k, v = (pad(x).requires_grad_() for x in (q, k, v))
    out = tree_attention(q, k, v, layout.attention, scale=SCALE)
    found = torch.autograd.grad((out * pad(upstream)).sum(), (q, k, v))
    n = len(expected)
    assert relative_error(out[:n], expected) <= 1e-13
    for mine, reference in zip(found, gradients, strict=True):
        assert relative_error(mine[:n], reference) <= 1e-12
        assert not mine[n:].any()  # padding has no gradient and gives none
    assert not out[n:].any()


def test_bfloat16_keeps_the_log_sum_exps_in_float32() -> None:
    sizes = CASES["long"]
    q, k, v, upstream = _inputs(sizes, 4, 2, torch.bfloat16, 32)
    expected, gradients = _dense(sizes, *(x.double() for x in (q, k, v, upstream)))
    (layout,) = Packing(4096).micro_batches(_trees(sizes))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = tree_attention(q, k, v, layout.attention, scale=SCALE)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    assert out.dtype == torch.bfloat16 and relative_error(out, expected) < 5e-3
    assert all(relative_error(x, y) < 1e-2 for x, y in zip(found, gradients, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_backend_equals_the_flash_operator(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    q, g = (torch.randn(3, 4, 21, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(3, 2, 21 if causal else 34, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    out, lse = attention_ops.forward(q, k, v, causal=causal, scale=SCALE)
    more = lse + 0.7  # as if other keys were seen as well
    grads = attention_ops.backward(g, q, k, v, out, more, causal=causal, scale=SCALE)
    monkeypatch.setattr(attention_ops, "_backend", lambda q: "plain")
    monkeypatch.setattr(attention_ops, "_BLOCK", 8)
    plain = attention_ops.forward(q, k, v, causal=causal, scale=SCALE)
    plain_grads = attention_ops.backward(g, q, k, v, out, more, causal=causal, scale=SCALE)
    for mine, theirs in zip((*plain, *plain_grads), (out, lse, *grads), strict=True):
        assert relative_error(mine, theirs) <= 1e-13


def _on_rank(rank: int, world: int, names, heads: int, kv: int, piece_tokens: int):
    import torch.distributed as dist

    found = {}
    for name in names:
        sizes = CASES[name]
        inputs = _inputs(sizes, heads, kv)
        cost = Cost(token=1.0, pair=0.05)
        packing = Packing(4096, cp=world, multiple_of=2, cost=cost, piece_tokens=piece_tokens)
        (layout,) = packing.micro_batches(_trees(sizes), cp_rank=rank)
        place = torch.from_numpy(layout.place_S)
        q, k, v, upstream = (torch.where(place[:, None, None] >= 0, x[place], 3.0) for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = tree_attention(q, k, v, layout.attention, group=dist.group.WORLD, scale=SCALE)
        gradients = torch.autograd.grad((out * upstream).sum(), (q, k, v))
        found[name] = layout, out.detach(), gradients
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("piece_tokens", [3, 4096])
def test_context_parallel_ranks_together_equal_a_dense_mask(world: int, piece_tokens: int) -> None:
    ranks = run_distributed(_on_rank, world, list(CASES), 4, 2, piece_tokens)
    for name, sizes in CASES.items():
        expected, gradients = _dense(sizes, *_inputs(sizes, 4, 2))
        held = []
        for found in ranks:
            layout, *tensors = found[name]
            place = torch.from_numpy(layout.place_S)
            real = place >= 0
            assert int((~real).sum()) == layout.num_padding and not real[len(real) - layout.num_padding :].any()
            held.append(place[real])
            whole = (expected, *gradients)
            for mine, reference in zip((tensors[0], *tensors[1]), whole, strict=True):
                assert torch.allclose(mine[real], reference[place[real]], rtol=0, atol=1e-12), name
                assert not mine[~real].any()
        assert torch.equal(torch.cat(held).sort().values, torch.arange(len(expected)))  # each token on one rank

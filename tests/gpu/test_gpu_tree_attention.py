"""The operators of attention on a GPU against plain products in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from megatron_dgrpo.model import attention_ops
from megatron_dgrpo.testing.gradients import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_forward_and_backward_equal_those_on_the_cpu(
    dtype: torch.dtype, within: float, causal: bool, parts: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    make = lambda heads, n: torch.randn(n * parts, heads, 64, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    keys = 300 if causal else 517
    whole = make(8, 300), make(2, keys), make(2, keys), make(8, 300)
    view = lambda x, where, to: x.to(where, to).unflatten(0, (parts, -1)).transpose(1, 2)  # noqa: E731
    q, k, v, g = (view(x, "cpu", torch.float64) for x in whole)
    out, lse = attention_ops.forward(q, k, v, causal=causal, scale=0.1)
    more = lse + 0.7  # as if other keys were seen as well
    expected = out, lse, *attention_ops.backward(g, q, k, v, out, more, causal=causal, scale=0.1)
    q, k, v, g = (view(x, "cuda", dtype) for x in whole)
    mine, sums = attention_ops.forward(q, k, v, causal=causal, scale=0.1)
    grads = attention_ops.backward(g, q, k, v, mine, sums + 0.7, causal=causal, scale=0.1)
    for found, reference in zip((mine, sums, *grads), expected, strict=True):
        assert relative_error(found.cpu(), reference) <= within

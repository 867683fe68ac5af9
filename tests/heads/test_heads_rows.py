"""Selecting loss rows: repeated rows, half precision, no rows. Sequence parallelism is in test_heads_parallel."""

from __future__ import annotations

import torch

from megatron_dgrpo.heads import gather_rows


def test_a_row_that_several_responses_start_from_gets_the_sum() -> None:
    """400 gradients of 1 in bfloat16: added up one by one they would stop growing at 256."""
    hidden = torch.randn(5, 1, 3, dtype=torch.bfloat16, requires_grad=True)
    index = torch.tensor([4] * 400 + [1])
    rows = gather_rows(hidden, index, group=None, sequence_parallel=True)
    assert torch.equal(rows, hidden[index, 0])
    rows.backward(torch.ones_like(rows))
    assert hidden.grad[:, 0, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 400.0]


def test_no_rows() -> None:
    hidden = torch.randn(5, 1, 3, requires_grad=True)
    rows = gather_rows(hidden, torch.empty(0, dtype=torch.int64), group=None, sequence_parallel=False)
    assert rows.shape == (0, 3)
    rows.sum().backward()
    assert not hidden.grad.any()

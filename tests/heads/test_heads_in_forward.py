"""What is particular to gradients in forward: coefficients from statistics, scaling, single use, no-grad."""

from __future__ import annotations

import pytest
import torch
from heads_reference import dense

from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.heads import HeadShard, row_statistics_with_gradients


def problem():
    generator = torch.Generator().manual_seed(3)
    random = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    return random(21, 8), random(50, 8), random(21, 6), random(50, 6), torch.randint(0, 50, (21,), generator=generator)


def run(hidden, weight, teacher_TH, teacher_VH, targets_T, coefficients, **kwargs):
    return row_statistics_with_gradients(
        hidden,
        HeadShard(weight, 0, 50),
        targets_T,
        temperature=0.9,
        group=None,
        coefficients=coefficients,
        teacher_hidden_TH=teacher_TH,
        teacher_head=HeadShard(teacher_VH, 0, 50),
        chunk_rows=6,
        tile=16,
        **kwargs,
    )


def test_coefficients_may_depend_on_the_rows_own_statistics() -> None:
    """A ratio to old log-probs and a squared KL: d loss / d statistic is formed from the statistics of the chunk."""
    hidden_TH, weight_VH, teacher_TH, teacher_VH, targets_T = problem()
    old_T = torch.linspace(-6, -1, 21, dtype=torch.float64)
    ref_hidden, ref_weight = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    ref = dense(ref_hidden, ref_weight, targets_T, 0.9, teacher_TH, teacher_VH)
    (((ref["logprob"] - old_T).exp() + ref["kl"] ** 2).sum() * 2.5).backward()

    seen = []

    def coefficients(part, rows):
        seen.append((rows.start, rows.stop))
        return {"logprob": (part.logprob_T - old_T[rows]).exp(), "kl": 2 * part.kl_T}

    hidden, weight = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    out, carrier = run(hidden, weight, teacher_TH, teacher_VH, targets_T, coefficients)
    assert seen == [(0, 6), (6, 12), (12, 18), (18, 21)]
    assert float(carrier.detach()) == 0.0 and not out.kl_T.requires_grad
    (carrier * 2.5).backward()
    torch.testing.assert_close(out.kl_T, ref["kl"].detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, ref_hidden.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(weight.grad, ref_weight.grad, rtol=0, atol=1e-11)


def test_gradients_are_handed_over_once() -> None:
    hidden_TH, *rest = problem()
    _, carrier = run(hidden_TH.requires_grad_(), *rest, lambda part, rows: {"kl": torch.ones_like(part.kl_T)})
    carrier.backward(retain_graph=True)
    with pytest.raises(ObjectiveError, match="handed over once"):
        carrier.backward()


def test_without_gradients_only_statistics_are_made() -> None:
    hidden_TH, *rest = problem()
    with torch.no_grad():
        out, carrier = run(hidden_TH.requires_grad_(), *rest, lambda part, rows: {})
    assert not carrier.requires_grad and out.kl_T.shape == (21,)


def test_coefficients_of_what_has_no_gradient_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="teacher_logprob.*here logprob, kl"):
        run(*problem(), lambda part, rows: {"teacher_logprob": part.kl_T}, want=["kl", "teacher_logprob"])

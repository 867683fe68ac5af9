"""Half-precision inputs: gradients against float64 on the same numbers, from a distant teacher to a near one.

Logits kept in bfloat16 lose a small KL's gradient altogether; here they are float32 sums, and only the finished
gradient of a logit is rounded, on the way into a bfloat16 product. That product runs on CUDA; here its rounding is
imitated.
"""

from __future__ import annotations

import pytest
import torch
from heads_reference import dense

from megatron_dgrpo.heads import HeadShard, products, row_statistics, row_statistics_with_gradients

ROWS, VOCABULARY, SIZE, TEACHER_SIZE = 64, 1024, 128, 160


def near_teacher(spread: float):
    """A teacher that sees what the student sees, and something else; its KL grows with the square of `spread`."""
    generator = torch.Generator().manual_seed(1)
    random = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    hidden, weight = random(ROWS, SIZE).bfloat16(), (random(VOCABULARY, SIZE) * 0.25).bfloat16()
    more, more_weight = random(ROWS, TEACHER_SIZE - SIZE), random(VOCABULARY, TEACHER_SIZE - SIZE) * spread
    teacher, teacher_weight = torch.cat([hidden, more.bfloat16()], 1), torch.cat([weight, more_weight.bfloat16()], 1)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, teacher, teacher_weight, targets, random(ROWS).abs() + 0.5, random(ROWS)


def imitate_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands stay bfloat16, the logit gradient is rounded to it, sums are float32: as on CUDA."""

    def addmm_wide(out, left, right, *, beta, alpha):
        assert left.dtype == right.dtype == torch.bfloat16 and out.dtype == torch.float32
        out.copy_(torch.addmm(out, left.float(), right.float(), beta=beta, alpha=alpha))
        return out

    monkeypatch.setattr(products, "native", lambda x, dtype: True)
    monkeypatch.setattr(products, "_addmm_wide", addmm_wide)


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("mode", ["recompute", "in forward"])
@pytest.mark.parametrize("half_products", [False, True])
@pytest.mark.parametrize(
    "spread, low, high", [(0.0025, 5e-5, 2e-4), (0.025, 5e-3, 2e-2), (0.3, 0.5, 2.0), (1.2, 7, 20)]
)
def test_gradients_of_bfloat16_inputs(
    mode: str, half_products: bool, spread: float, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, teacher, teacher_weight, targets, by_kl, by_logprob = near_teacher(spread)
    for with_logprob in (False, True):
        upstream = {"kl": by_kl} | ({"logprob": by_logprob} if with_logprob else {})
        ref_hidden, ref_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
        reference = dense(ref_hidden, ref_weight, targets, 0.9, teacher.double(), teacher_weight.double())
        assert low < float(reference["kl"].detach().mean()) < high
        sum((reference[n] * c_T.double()).sum() for n, c_T in upstream.items()).backward()

        if half_products:
            imitate_tensor_cores(monkeypatch)
        own_hidden, own_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        own_weight.main_grad = torch.zeros(VOCABULARY, SIZE)
        kwargs = dict(
            temperature=0.9,
            group=None,
            teacher_hidden_TH=teacher,
            teacher_head=HeadShard(teacher_weight, 0, VOCABULARY),
            want=["logprob", "kl", "entropy"],
            chunk_rows=40,
            tile=300,
        )
        head = HeadShard(own_weight, 0, VOCABULARY)
        if mode == "recompute":
            out = row_statistics(own_hidden, head, targets, **kwargs)
            sum((getattr(out, f"{n}_T") * c_T).sum() for n, c_T in upstream.items()).backward()
        else:
            given = lambda part, rows: {n: c_T[rows] for n, c_T in upstream.items()}  # noqa: B023, E731
            out, carrier = row_statistics_with_gradients(own_hidden, head, targets, coefficients=given, **kwargs)
            carrier.backward()
        assert out.kl_T.dtype == torch.float32 and own_hidden.grad.dtype == torch.bfloat16
        for name in ("logprob", "entropy", "kl"):
            torch.testing.assert_close(getattr(out, f"{name}_T").double(), reference[name], rtol=1e-5, atol=5e-6)
        assert relative(own_hidden.grad, ref_hidden.grad) <= 0.005
        assert relative(own_weight.main_grad, ref_weight.grad) <= 0.005
        monkeypatch.undo()


def test_a_sure_token_keeps_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """At p_y near 1 the target's entry cancels p_y c_lp: they are summed before anything is rounded to bfloat16."""
    imitate_tensor_cores(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 64, generator=generator).bfloat16()
    targets = torch.randint(0, 256, (32,), generator=generator)
    hidden = (weight[targets].float() * 0.22).bfloat16().requires_grad_()
    ref = hidden.detach().double().requires_grad_()
    reference = dense(ref, weight.double(), targets, 1.0)["logprob"]
    left_T = 1 - reference.exp().detach()
    sure_T = (1e-4 < left_T) & (left_T < 1e-2)  # beyond, 1 - p_y is noise in float32
    assert sure_T.sum() >= 10
    reference.sum().backward()
    row_statistics(
        hidden, HeadShard(weight, 0, 256), targets, temperature=1.0, group=None, want=[]
    ).logprob_T.sum().backward()
    error_T = (hidden.grad.double() - ref.grad).norm(dim=1) / ref.grad.norm(dim=1)
    assert error_T[sure_T].max() <= 0.01 and error_T[sure_T].median() <= 0.005


def test_float32_statistics_of_large_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 16, generator=generator) * 50, torch.randn(97, 16, generator=generator) * 50
    teacher = hidden + torch.randn(20, 16, generator=generator) * 1e-2
    targets = torch.randint(0, 97, (20,), generator=generator)
    reference = dense(hidden.double(), weight.double(), targets, 1.0, teacher.double(), weight.double())
    out = row_statistics(
        hidden,
        HeadShard(weight, 0, 97),
        targets,
        temperature=1.0,
        group=None,
        teacher_hidden_TH=teacher,
        teacher_head=HeadShard(weight, 0, 97),
        tile=30,
    )
    largest = float((hidden @ weight.T).abs().amax())
    assert largest > 1e4
    for name in ("logprob", "entropy", "kl"):
        difference_T = (getattr(out, f"{name}_T").double() - reference[name]).abs()
        assert difference_T.max() <= 1e-6 * largest, name

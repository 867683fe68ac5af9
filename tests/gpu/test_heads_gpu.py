"""The heads on a device: half-precision products, Triton kernels, memory. Reference: float64 on the same numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_dgrpo.heads import HeadShard, products, row_statistics, row_statistics_with_gradients
from megatron_dgrpo.heads import elementwise as dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, VOCABULARY, SIZE, TEACHER_SIZE = 512, 9001, 256, 320


def near_teacher(spread: float):
    """bfloat16 student and teacher whose KL grows with the square of `spread`."""
    generator = torch.Generator("cuda").manual_seed(1)
    random = lambda *size: torch.randn(*size, generator=generator, device="cuda")  # noqa: E731
    hidden, weight = random(ROWS, SIZE).bfloat16(), (random(VOCABULARY, SIZE) * 0.18).bfloat16()
    more, more_weight = random(ROWS, TEACHER_SIZE - SIZE), random(VOCABULARY, TEACHER_SIZE - SIZE) * spread
    teacher, teacher_weight = torch.cat([hidden, more.bfloat16()], 1), torch.cat([weight, more_weight.bfloat16()], 1)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator, device="cuda")
    return hidden, weight, teacher, teacher_weight, targets, random(ROWS).abs() + 0.5, random(ROWS)


def dense(hidden, weight, teacher, teacher_weight, targets):
    logp_TV = torch.log_softmax(hidden @ weight.t() / 0.9, -1)
    logq_TV = torch.log_softmax(teacher @ teacher_weight.t() / 0.9, -1)
    kl_T = (logp_TV.exp() * (logp_TV - logq_TV)).sum(1)
    return logp_TV.gather(1, targets[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(1), kl_T


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("mode", ["recompute", "in forward"])
@pytest.mark.parametrize(
    "spread, low, high", [(0.0018, 5e-5, 2e-4), (0.018, 5e-3, 2e-2), (0.2, 0.5, 2.5), (0.9, 7, 25)]
)
def test_gradients_of_bfloat16_inputs(mode: str, spread: float, low: float, high: float) -> None:
    hidden, weight, teacher, teacher_weight, targets, by_kl, by_logprob = near_teacher(spread)
    for with_logprob in (False, True):
        ref_hidden, ref_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
        logprob_T, entropy_T, kl_T = dense(ref_hidden, ref_weight, teacher.double(), teacher_weight.double(), targets)
        assert low < float(kl_T.detach().mean()) < high
        ((kl_T * by_kl).sum() + with_logprob * (logprob_T * by_logprob).sum()).backward()
        own_hidden, own_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        own_weight.main_grad = torch.zeros(VOCABULARY, SIZE, device="cuda")
        head = HeadShard(own_weight, 0, VOCABULARY)
        kwargs = dict(
            temperature=0.9,
            group=None,
            teacher_hidden_TH=teacher,
            teacher_head=HeadShard(teacher_weight, 0, VOCABULARY),
            chunk_rows=200,
            tile=2048,
        )
        if mode == "recompute":
            out = row_statistics(own_hidden, head, targets, **kwargs)
            ((out.kl_T * by_kl).sum() + with_logprob * (out.logprob_T * by_logprob).sum()).backward()
        else:
            given = lambda part, rows: {  # noqa: E731
                "kl": by_kl[rows],
                "logprob": with_logprob * by_logprob[rows],  # noqa: B023
            }
            out, carrier = row_statistics_with_gradients(own_hidden, head, targets, coefficients=given, **kwargs)
            carrier.backward()
        for ours, reference in ((out.logprob_T, logprob_T), (out.entropy_T, entropy_T), (out.kl_T, kl_T)):
            torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=2e-5)
        assert relative(own_hidden.grad, ref_hidden.grad) <= 0.005
        assert relative(own_weight.main_grad, ref_weight.grad) <= 0.005


@pytest.mark.parametrize("names", [("logprob", "entropy", "kl", "forward_kl"), ("kl", "kl_topk_student_tail", "jsd")])
def test_kernels_equal_pytorch(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, teacher, teacher_weight, targets, by, _ = near_teacher(0.2)
    results = []
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(dispatch, "_by_kernel", lambda x: False)
        assert dispatch._by_kernel(torch.zeros(1, device="cuda")) is by_kernel
        own_hidden, own_weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
        out = row_statistics(
            own_hidden,
            HeadShard(own_weight, 0, VOCABULARY),
            targets,
            temperature=0.9,
            group=None,
            teacher_hidden_TH=teacher.float(),
            teacher_head=HeadShard(teacher_weight[:8000].float(), 0, 8000),
            want=names,
            topk=16,
            chunk_rows=200,
            tile=1000,
        )
        sum((getattr(out, f"{n}_T") * by).sum() for n in names).backward()
        results.append([*(getattr(out, f"{n}_T").detach() for n in names), own_hidden.grad, own_weight.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_products_have_float32_results() -> None:
    left, right = torch.randn(64, 96, device="cuda").bfloat16(), torch.randn(80, 96, device="cuda").bfloat16()
    exact = left.double() @ right.double().t()
    out = torch.full((64, 80), float("nan"), device="cuda")
    products.logits(out, left, right, 0.5)  # what was in the buffer must not matter
    torch.testing.assert_close(out.double(), exact * 0.5, rtol=1e-5, atol=1e-5)
    wide = torch.ones(64, 200, device="cuda")
    products.logits(wide[:, 40:120], left, right, 1.0)
    torch.testing.assert_close(wide[:, 40:120].double(), exact, rtol=1e-5, atol=1e-5)
    assert bool((wide[:, :40] == 1).all()) and bool((wide[:, 120:] == 1).all())
    products.add_product(out, left, right.t())
    torch.testing.assert_close(out.double(), exact * 1.5, rtol=1e-5, atol=1e-5)


def test_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    size, vocabulary = 256, 50_000
    weight = torch.randn(vocabulary, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad = torch.zeros(vocabulary, size, device="cuda")
    peaks = []
    for rows in (16_384, 131_072):
        hidden = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head = HeadShard(weight, 0, vocabulary)
        out = row_statistics(
            hidden,
            head,
            targets,
            temperature=1.0,
            group=None,
            teacher_hidden_TH=hidden,
            teacher_head=HeadShard(weight.detach(), 0, vocabulary),
            want=["logprob", "kl"],
        )
        (out.logprob_T.sum() + out.kl_T.sum()).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out
    assert (peaks[1] - peaks[0]) / (131_072 - 16_384) <= 1.15 * 2 * size + 64

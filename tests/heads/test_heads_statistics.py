"""Recompute mode on one rank against the dense reference: every statistic, gradient and shape of vocabulary."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from heads_reference import BASIC, DIFFERENTIABLE, dense, student_shard, teacher_shard
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dgrpo.heads import HeadShard, row_statistics
from megatron_dgrpo.heads.results import NAMES

CASES = {
    # name: (vocabulary, teacher's vocabulary, rows, logit scale)
    "same vocabulary": (97, 97, 33, 1.0),
    "teacher lacks ids": (97, 90, 33, 1.0),
    "teacher has more": (97, 120, 33, 1.0),
    "one row": (97, 90, 1, 1.0),
    "no rows": (97, 97, 0, 1.0),
    "one id": (1, 1, 5, 1.0),
    "one shared id": (40, 1, 5, 1.0),
    "logits of 1e4": (97, 97, 33, 2.5e3),
    "logits of 1e4, more ids": (97, 120, 33, 2.5e3),
}


def problem(vocabulary: int, teacher_vocabulary: int, rows: int, scale: float):
    generator = torch.Generator().manual_seed(vocabulary + rows)
    random = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    hidden_TH, weight_VH = random(rows, 16) * scale**0.5 / 2, random(vocabulary, 16) * scale**0.5 / 2
    teacher_TH, teacher_WH = random(rows, 24) * scale**0.5 / 2.2, random(teacher_vocabulary, 24) * scale**0.5 / 2.2
    targets_T = torch.randint(0, vocabulary, (rows,), generator=generator)
    upstream = {name: random(rows) for name in DIFFERENTIABLE}
    return hidden_TH, weight_VH, teacher_TH, teacher_WH, targets_T, upstream


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_dense_autograd(case: str, temperature: float) -> None:
    vocabulary, teacher_vocabulary, rows, scale = CASES[case]
    hidden_TH, weight_VH, teacher_TH, teacher_WH, targets_T, upstream = problem(*CASES[case])
    names = BASIC if scale > 1 or min(vocabulary, teacher_vocabulary) < 6 else DIFFERENTIABLE
    ref_hidden, ref_weight = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    reference = dense(ref_hidden, ref_weight, targets_T, temperature, teacher_TH, teacher_WH, k=min(5, vocabulary))
    sum((reference[n] * upstream[n]).sum() for n in names).backward()

    hidden = hidden_TH.clone().requires_grad_()
    head = student_shard(weight_VH, 0, vocabulary + 3)
    teacher = teacher_shard(teacher_WH, head, vocabulary, last=True)
    want = NAMES if names == DIFFERENTIABLE else (*BASIC, "teacher_logprob")
    out = row_statistics(
        hidden,
        head,
        targets_T,
        temperature=temperature,
        group=None,
        teacher_hidden_TH=teacher_TH,
        teacher_head=teacher,
        want=want,
        topk=5,
        chunk_rows=10,
        tile=13,
    )
    sum((getattr(out, f"{n}_T") * upstream[n]).sum() for n in names).backward()

    largest = float((hidden_TH @ weight_VH.T).abs().amax()) / temperature if rows else 0.0
    assert scale == 1.0 or largest > 1e4 or min(vocabulary, rows) < 2
    tolerance = 1e-12 * max(1.0, largest)
    for name in {*want, "removed_mass", "outside_mass"}:
        torch.testing.assert_close(
            getattr(out, f"{name}_T"), reference[name].detach(), rtol=0, atol=tolerance, check_stride=False
        )
    torch.testing.assert_close(hidden.grad, ref_hidden.grad, rtol=0, atol=tolerance)
    torch.testing.assert_close(head.weight_VH.grad[:vocabulary], ref_weight.grad, rtol=0, atol=tolerance)
    assert not head.weight_VH.grad[vocabulary:].any()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_statistic_alone_has_its_own_gradient(name: str) -> None:
    hidden_TH, weight_VH, teacher_TH, teacher_WH, targets_T, upstream = problem(97, 90, 9, 1.0)
    ref_hidden, ref_weight = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    reference = dense(ref_hidden, ref_weight, targets_T, 0.7, teacher_TH, teacher_WH, alpha=0.3)
    (reference[name] * upstream[name]).sum().backward()
    hidden, head = hidden_TH.clone().requires_grad_(), student_shard(weight_VH, 0, 100)
    out = row_statistics(
        hidden,
        head,
        targets_T,
        temperature=0.7,
        group=None,
        teacher_hidden_TH=teacher_TH,
        teacher_head=teacher_shard(teacher_WH, head, 97, last=True),
        want=[name],
        jsd_alpha=0.3,
        topk=5,
        chunk_rows=4,
        tile=50,
    )
    value_T = getattr(out, f"{name}_T")
    torch.testing.assert_close(value_T, reference[name], rtol=0, atol=1e-12)
    (value_T * upstream[name]).sum().backward()
    torch.testing.assert_close(hidden.grad, ref_hidden.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(head.weight_VH.grad[:97], ref_weight.grad, rtol=0, atol=1e-12)


def test_without_teacher() -> None:
    hidden_TH, weight_VH, _, _, targets_T, upstream = problem(97, 97, 9, 1.0)
    ref_hidden = hidden_TH.clone().requires_grad_()
    reference = dense(ref_hidden, weight_VH, targets_T, 1.0)
    (reference["logprob"] * upstream["logprob"]).sum().backward()
    hidden = hidden_TH.clone().requires_grad_()
    out = row_statistics(hidden, HeadShard(weight_VH, 0, 97), targets_T, temperature=1.0, group=None, want=["logprob"])
    assert out.entropy_T is None and out.kl_T is None and out.outside_mass_T is None
    (out.logprob_T * upstream["logprob"]).sum().backward()
    torch.testing.assert_close(out.logprob_T, reference["logprob"], rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, ref_hidden.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_teacher_equal_to_the_student(dtype: torch.dtype) -> None:
    """KL and its gradient vanish exactly: nothing is the difference of two large numbers."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(301, 32, generator=generator).to(dtype).requires_grad_()
    head = HeadShard(weight, 0, 301)
    out = row_statistics(
        hidden,
        head,
        torch.randint(0, 301, (20,), generator=generator),
        temperature=0.8,
        group=None,
        teacher_hidden_TH=hidden,
        teacher_head=HeadShard(weight.detach(), 0, 301),
        want=["kl", "forward_kl", "jsd"],
        chunk_rows=7,
        tile=64,
    )
    assert out.kl_T.abs().max() <= 1e-6 and out.forward_kl_T.abs().max() <= 1e-6 and out.jsd_T.abs().max() <= 1e-6
    (out.kl_T.sum() + out.forward_kl_T.sum() + out.jsd_T.sum()).backward()
    assert hidden.grad.abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert weight.grad.abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_tied_head_gets_both_gradients() -> None:
    """Without main_grad: the embedding's gradient and the head's meet in autograd."""
    _, weight_VH, _, _, targets_T, upstream = problem(97, 97, 33, 1.0)
    ids_T = targets_T.roll(1)
    ref = weight_VH.clone().requires_grad_()
    (dense(ref[ids_T].tanh(), ref, targets_T, 0.7)["logprob"] * upstream["logprob"]).sum().backward()
    tied = weight_VH.clone().requires_grad_()
    out = row_statistics(tied[ids_T].tanh(), HeadShard(tied, 0, 97), targets_T, temperature=0.7, group=None, want=[])
    (out.logprob_T * upstream["logprob"]).sum().backward()
    torch.testing.assert_close(tied.grad, ref.grad, rtol=0, atol=1e-12)


def test_results_do_not_depend_on_chunks_and_tiles() -> None:
    hidden_TH, weight_VH, teacher_TH, teacher_WH, targets_T, upstream = problem(97, 90, 33, 1.0)
    results = []
    for chunk_rows, tile in ((33, 97), (1, 97), (5, 7), (64, 1), (None, None)):
        hidden, head = hidden_TH.clone().requires_grad_(), student_shard(weight_VH, 0, 97)
        out = row_statistics(
            hidden,
            head,
            targets_T,
            temperature=0.7,
            group=None,
            teacher_hidden_TH=teacher_TH,
            teacher_head=teacher_shard(teacher_WH, head, 97, last=True),
            want=BASIC,
            chunk_rows=chunk_rows,
            tile=tile,
        )
        sum((getattr(out, f"{n}_T") * upstream[n]).sum() for n in BASIC).backward()
        results.append((out.kl_T.detach(), hidden.grad, head.weight_VH.grad))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // max(1, x.element_size()))
        return out


def test_nothing_of_size_rows_times_vocabulary_exists() -> None:
    rows, vocabulary, size = 600, 700, 8
    hidden = torch.randn(rows, size, requires_grad=True)
    head = HeadShard(torch.randn(vocabulary, size, requires_grad=True), 0, vocabulary)
    teacher_TH, teacher_VH = torch.randn(rows, size), torch.randn(vocabulary, size)
    with Largest() as seen:
        out = row_statistics(
            hidden,
            head,
            torch.zeros(rows, dtype=torch.int64),
            temperature=1.0,
            group=None,
            teacher_hidden_TH=teacher_TH,
            teacher_head=HeadShard(teacher_VH, 0, vocabulary),
            want=[*BASIC, "jsd", "kl_topk_student_tail", "topk_overlap"],
            topk=4,
            chunk_rows=50,
            tile=64,
        )
        sum(getattr(out, f"{n}_T").sum() for n in (*BASIC, "jsd", "kl_topk_student_tail")).backward()
    assert seen.elements <= max(rows, vocabulary) * 2 * size < rows * vocabulary // 30


def test_the_graph_is_freed_with_the_loss() -> None:
    hidden_TH, weight_VH, _, _, targets_T, _ = problem(97, 97, 33, 1.0)
    hidden = hidden_TH.clone().requires_grad_()
    out = row_statistics(
        hidden * 1, HeadShard(weight_VH, 0, 97), targets_T, temperature=1.0, group=None, want=["entropy"]
    )
    alive = weakref.ref(out.entropy_T)
    gc.disable()
    try:
        (out.logprob_T.sum() + out.entropy_T.sum()).backward()
        del out
        assert alive() is None
    finally:
        gc.enable()


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    hidden_TH, weight_VH, _, _, targets_T, _ = problem(97, 97, 33, 1.0)
    hidden, weight = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    out = row_statistics(hidden, HeadShard(weight, 0, 97), targets_T, temperature=1.0, group=None, want=[])
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprob_T.sum().backward()

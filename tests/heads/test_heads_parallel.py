"""Both modes on 1, 2 and 4 vocabulary shards, against the dense reference: values, gradients, number of collectives."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from heads_reference import BASIC, DIFFERENTIABLE, dense, student_shard, teacher_shard

from megatron_dgrpo.heads import HeadShard, gather_rows, row_statistics, row_statistics_with_gradients
from megatron_dgrpo.heads.statistics import evaluate, make_call, make_pair
from megatron_dgrpo.heads.sweep import Plan, Sweep
from megatron_dgrpo.testing import run_distributed

TOKENS, SIZE, TEACHER_SIZE, TEMPERATURE = 24, 16, 12, 0.7
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all")


@contextmanager
def counted():
    """Names of the collectives that are called."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        return lambda *args, **kwargs: (calls.append(name), originals[name](*args, **kwargs))[1]

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def batch(rows: int, vocabulary: int, teacher_vocabulary: int, rows_per_rank: int, ranks: int):
    """A whole sequence of hidden states, and loss rows among them with a target on every shard."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    random = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    hidden_S1H, weight_VH = random(TOKENS, 1, SIZE), random(vocabulary, SIZE)
    teacher_TH, teacher_WH = random(rows, TEACHER_SIZE), random(teacher_vocabulary, TEACHER_SIZE)
    targets_T = torch.randint(0, vocabulary, (rows,), generator=generator)
    for rank in range(min(ranks, rows)):
        targets_T[rank] = min(vocabulary - 1, rank * rows_per_rank)
    row_index_T = torch.randint(0, TOKENS, (rows,), generator=generator)
    upstream = {name: random(rows) for name in DIFFERENTIABLE}
    return hidden_S1H, weight_VH, teacher_TH, teacher_WH, targets_T, row_index_T, upstream


def one_rank(rank: int, ranks: int, case: tuple, mode: str, names: tuple[str, ...], sequence_parallel: bool):
    rows, vocabulary, teacher_vocabulary, rows_per_rank = case
    hidden_S1H, weight_VH, teacher_TH, teacher_WH, targets_T, row_index_T, upstream = batch(*case, ranks)
    ref_hidden, ref_weight = hidden_S1H.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    reference = dense(ref_hidden[row_index_T, 0], ref_weight, targets_T, TEMPERATURE, teacher_TH, teacher_WH)
    sum((reference[n] * upstream[n]).sum() for n in names).backward()

    here = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks) if sequence_parallel else slice(None)
    hidden = hidden_S1H[here].clone().requires_grad_()
    head = student_shard(weight_VH, rank, rows_per_rank)
    kwargs = dict(
        temperature=TEMPERATURE,
        group=dist.group.WORLD,
        teacher_hidden_TH=teacher_TH,
        teacher_head=teacher_shard(teacher_WH, head, vocabulary, last=rank == ranks - 1),
        want=names,
        topk=5,
        chunk_rows=8,
        tile=11,
    )
    with counted() as forward_calls:
        rows_TH = gather_rows(hidden, row_index_T, group=dist.group.WORLD, sequence_parallel=sequence_parallel)
        if mode == "recompute":
            out = row_statistics(rows_TH, head, targets_T, **kwargs)
            loss = sum((getattr(out, f"{n}_T") * upstream[n]).sum() for n in names)
        else:
            given = lambda part, at: {n: upstream[n][at] for n in names}  # noqa: E731
            out, carrier = row_statistics_with_gradients(rows_TH, head, targets_T, coefficients=given, **kwargs)
            loss = 3.0 * carrier / 3.0
    with counted() as backward_calls:
        loss.backward()
    errors = {n: worst(getattr(out, f"{n}_T"), reference[n]) for n in (*names, "removed_mass", "outside_mass")}
    errors["hidden gradient"] = worst(hidden.grad, ref_hidden.grad[here])
    valid = slice(head.start, head.start + head.num_valid)
    errors["head gradient"] = worst(head.weight_VH.grad[: head.num_valid], ref_weight.grad[valid])
    errors["padding"] = float(head.weight_VH.grad[head.num_valid :].abs().sum())
    return errors, forward_calls, backward_calls


def worst(x: torch.Tensor, y: torch.Tensor) -> float:
    assert x.shape == y.shape
    return float((x - y).detach().abs().amax()) if x.numel() else 0.0


CASES = {
    # name: (rows, vocabulary, teacher's vocabulary, rows per shard)
    "shards of unequal use": (19, 101, 101, {1: 101, 2: 51, 4: 26}),
    "teacher lacks ids": (19, 101, 80, {1: 101, 2: 64, 4: 26}),
    "teacher has more": (19, 101, 110, {1: 104, 2: 51, 4: 26}),
    "shards that are all padding": (19, 50, 47, {1: 64, 2: 64, 4: 25}),
    "one row": (1, 101, 95, {1: 101, 2: 51, 4: 26}),
    "no rows": (0, 101, 95, {1: 101, 2: 51, 4: 26}),
}


def every_case(rank: int, ranks: int, mode: str):
    errors = {}
    for name, (*sizes, per_rank) in CASES.items():
        for sequence_parallel in (False, True):
            case = (*sizes, per_rank[ranks])
            errors[name, sequence_parallel] = one_rank(rank, ranks, case, mode, BASIC, sequence_parallel)[0]
    return errors


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mode", ["recompute", "in forward"])
def test_shards_equal_the_dense_reference(ranks: int, mode: str) -> None:
    for of_rank in run_distributed(every_case, ranks, mode):
        for case, errors in of_rank.items():
            assert max(errors.values()) <= 1e-12, (case, errors)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mode", ["recompute", "in forward"])
def test_everything_at_once_on_shards(ranks: int, mode: str) -> None:
    case = (19, 101, 80, {1: 101, 2: 64, 4: 26}[ranks])
    for errors, _, _ in run_distributed(one_rank, ranks, case, mode, DIFFERENTIABLE, True):
        assert max(errors.values()) <= 1e-12, errors


def test_number_of_collectives() -> None:
    """It does not depend on the number of rows, but with gradients in forward on that of chunks (8 rows each)."""
    for rows in (1, 8, 19):
        case = (rows, 101, 95, 51)
        for sequence_parallel in (False, True):
            gather = ["all_reduce"] if sequence_parallel else []
            for _, forward, backward in run_distributed(one_rank, 2, case, "recompute", BASIC, sequence_parallel):
                assert forward == [*gather, "all_reduce", "all_reduce"]  # rows; MAX and SUM
                assert backward == ["all_reduce"]  # the hidden gradient
            for _, forward, backward in run_distributed(one_rank, 2, case, "in forward", BASIC, sequence_parallel):
                assert forward == [*gather, *["all_reduce"] * (2 * -(-rows // 8) + 1)]
                assert backward == []
    for _, forward, backward in run_distributed(one_rank, 2, (0, 101, 95, 51), "recompute", BASIC, True):
        assert forward == backward == []


def test_ranks_choose_the_same_chunks() -> None:
    """A shard that is all padding would have room for more rows, and would then miss collectives."""
    hidden_TH, teacher_TH = torch.zeros(9000, 4), torch.zeros(9000, 6)
    plans = set()
    for num_valid in (20_000, 13_000, 0):
        student = HeadShard(torch.zeros(20_000, 4), 0, num_valid)
        teacher = HeadShard(torch.zeros(num_valid, 6), 0, num_valid)
        plans.add(Plan.keep(make_pair(hidden_TH, student, teacher_TH, teacher), None, None).chunk_rows)
    assert len(plans) == 1 and plans.pop() < 9000


def unreduced(rank: int, ranks: int):
    case = (19, 101, 95, 51)
    hidden_S1H, weight_VH, _, _, targets_T, row_index_T, upstream = batch(*case, ranks)
    parts = []
    for reduce_hidden_gradient in (True, False):
        rows_TH = hidden_S1H[row_index_T, 0].clone().requires_grad_()
        out = row_statistics(
            rows_TH,
            student_shard(weight_VH, rank, 51),
            targets_T,
            temperature=1.0,
            group=dist.group.WORLD,
            want=["entropy"],
            reduce_hidden_gradient=reduce_hidden_gradient,
        )
        (out.entropy_T * upstream["entropy"]).sum().backward()
        parts.append(rows_TH.grad)
    return parts


def test_a_hidden_gradient_that_is_left_in_parts() -> None:
    (whole, first), (_, second) = run_distributed(unreduced, 2)
    torch.testing.assert_close(first + second, whole, rtol=0, atol=1e-12)
    assert (first - whole).abs().max() > 1e-3


def ties(rank: int, ranks: int):
    """Equal logits on both shards and in several tiles."""
    weight_VH = torch.ones(20, 4, dtype=torch.float64)
    weight_VH[7] = weight_VH[13] = 2.0
    head = student_shard(weight_VH, rank, 20 // ranks)
    teacher = teacher_shard(weight_VH.flip(0), head, 20, last=False)
    hidden_TH = torch.ones(3, 4, dtype=torch.float64)
    pair = make_pair(hidden_TH, head, hidden_TH, teacher)
    call = make_call(["topk_overlap"], pair, 1.0, dist.group.WORLD, 0.5, 4, "raise")
    with torch.no_grad():
        _, _, topk, _ = evaluate(Sweep(pair, 1.0, Plan(2, 3)), torch.zeros(3, dtype=torch.int64), call)
    return {model: support.id_TK for model, support in topk.supports.items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_of_equal_logits_the_lowest_ids_are_taken(ranks: int) -> None:
    for ids in run_distributed(ties, ranks):
        assert ids["student"].tolist() == [[7, 13, 0, 1]] * 3
        assert ids["teacher"].tolist() == [[6, 12, 0, 1]] * 3

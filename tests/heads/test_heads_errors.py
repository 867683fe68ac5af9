"""Bad input: a clear error on every rank, or a counted NaN; never a hang."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_dgrpo.errors import DGRPOError, NonFiniteError, ObjectiveError
from megatron_dgrpo.heads import HeadShard, gather_rows, row_statistics, row_statistics_with_gradients
from megatron_dgrpo.testing import run_distributed


def call(hidden=None, targets=None, weight=None, temperature=1.0, teacher=None, **kwargs):
    hidden = torch.ones(4, 8) if hidden is None else hidden
    head = HeadShard(torch.ones(10, 8) if weight is None else weight, 0, 10)
    targets = torch.zeros(4, dtype=torch.int64) if targets is None else targets
    kwargs = {"want": ["logprob"], "group": None} | kwargs
    if teacher is not None:
        kwargs |= {"teacher_hidden_TH": teacher, "teacher_head": HeadShard(torch.ones(10, 8), 0, 10)}
    return row_statistics(hidden, head, targets, temperature=temperature, **kwargs)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature(temperature: float) -> None:
    with pytest.raises(ObjectiveError, match="temperature is .* must be positive"):
        call(temperature=temperature)


def test_several_problems_are_listed_at_once() -> None:
    with pytest.raises(ObjectiveError) as caught:
        call(hidden=torch.ones(4, 6, dtype=torch.bfloat16), targets=torch.zeros(3, dtype=torch.int64), temperature=0)
    text = str(caught.value)
    assert "size 6, its head has 8" in text and "3 targets for 4 rows" in text and "temperature is 0" in text
    assert "bfloat16" in text


def test_names_and_teacher() -> None:
    with pytest.raises(ObjectiveError, match="no statistic is called 'perplexity'"):
        call(want=["perplexity"])
    with pytest.raises(ObjectiveError, match="'kl' needs a teacher"):
        call(want=["kl"])
    with pytest.raises(ObjectiveError, match="give both or neither"):
        call(teacher_head=HeadShard(torch.ones(10, 8), 0, 10))
    with pytest.raises(ObjectiveError, match="student's boundaries"):
        call(teacher_hidden_TH=torch.ones(4, 8), teacher_head=HeadShard(torch.ones(10, 8), 2, 10))
    with pytest.raises(ObjectiveError, match="11 ids where the student's has 10.*beyond_VH"):
        call(teacher_hidden_TH=torch.ones(4, 8), teacher_head=HeadShard(torch.ones(11, 8), 0, 11))
    with pytest.raises(ObjectiveError, match="alpha is 1.0"):
        call(teacher=torch.ones(4, 8), want=["jsd"], jsd_alpha=1.0)
    with pytest.raises(ObjectiveError, match="topk is 0"):
        call(teacher=torch.ones(4, 8), want=["topk_overlap"], topk=0)
    with pytest.raises(ObjectiveError, match=r"\[tokens, 1, hidden size\]"):
        gather_rows(torch.ones(4, 8), torch.zeros(1, dtype=torch.int64), group=None, sequence_parallel=False)


@pytest.mark.parametrize("target", [-1, 10, 1000])
def test_a_target_outside_the_vocabulary(target: int) -> None:
    targets = torch.tensor([1, target, 2, 3])
    with pytest.raises(ObjectiveError, match=f"rows 1: ids {target}"):
        call(targets=targets)
    kept = call(targets=targets, nonfinite="keep").logprob_T
    assert kept.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_hidden_states_that_are_not_finite(bad: float) -> None:
    hidden = torch.randn(4, 8)
    hidden[2, 3] = bad
    with pytest.raises(NonFiniteError, match="student's logits at rows 2: look at its hidden states"):
        call(hidden=hidden)
    with pytest.raises(NonFiniteError, match="teacher's logits at rows 2: look at its hidden states"):
        call(teacher=hidden, want=["kl"])
    kept = call(hidden=hidden, nonfinite="keep", want=["entropy"])
    assert kept.logprob_T.isfinite().tolist() == kept.entropy_T.isfinite().tolist() == [True, True, False, True]
    kept = call(teacher=hidden, nonfinite="keep", want=["kl", "forward_kl"])
    assert kept.kl_T.isfinite().tolist() == kept.forward_kl_T.isfinite().tolist() == [True, True, False, True]


def all_ranks_raise(rank: int, ranks: int, what: str, mode: str):
    """Only one rank's shard of the head is bad, or none has the target; every rank hears of it and goes on."""
    weight = torch.randn(10, 8)
    if what == "head" and rank == 1:
        weight[4, 2] = float("nan")
    targets = torch.tensor([0, 5, 19, 20 if what == "target" else 3])
    kwargs = dict(temperature=1.0, group=dist.group.WORLD, want=["entropy"])
    head = HeadShard(weight, rank * 10, 10)
    try:
        if mode == "recompute":
            row_statistics(torch.ones(4, 8), head, targets, **kwargs)
        else:
            row_statistics_with_gradients(
                torch.ones(4, 8), head, targets, coefficients=lambda part, rows: {}, chunk_rows=3, **kwargs
            )
        error = None
    except DGRPOError as caught:
        error = str(caught)
    dist.barrier()
    return error


@pytest.mark.parametrize("mode", ["recompute", "in forward"])
def test_every_rank_raises_together(mode: str) -> None:
    for error in run_distributed(all_ranks_raise, 2, "head", mode):
        assert "student's logits at rows 0, 1, 2, 3: look at its head" in error
    for error in run_distributed(all_ranks_raise, 2, "target", mode):
        assert "rows 3: ids 20" in error

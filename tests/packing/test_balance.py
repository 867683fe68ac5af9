"""FLOPs per rank on drawn long-context lengths; `tools/bench/balance.py` does more draws."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dgrpo.model.flops import forward_cost, training_cost
from megatron_dgrpo.packing.balance import balance
from megatron_dgrpo.packing.cost import Cost
from megatron_dgrpo.packing.layout import Span, TreeSpans
from megatron_dgrpo.packing.shards import TRUNK, deal, spans_of
from megatron_dgrpo.packing.trees import Run, Tree
from megatron_dgrpo.testing.long_context import BUDGET, QWEN3_8B, long_context_trees

COST = training_cost(QWEN3_8B)


def _pairs(length: int, seen: int) -> int:
    return sum(seen + i + 1 for i in range(length))


def test_costs_are_flops_counted_pair_by_pair() -> None:
    (tree,) = long_context_trees(1, 0)
    cost, spec = forward_cost(QWEN3_8B), QWEN3_8B
    prompt, responses = len(tree.trunk), [len(branch) for branch in tree.branches]
    layer = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 12288
    tokens = prompt + sum(responses)
    pairs = _pairs(prompt, 0) + sum(_pairs(n, prompt) for n in responses)
    flops = 36 * (2 * layer * tokens + 4 * 4096 * pairs) + 2 * 4096 * spec.vocab_size * sum(responses)
    assert cost.of(tree) == pytest.approx(flops, rel=1e-12)
    alone = sum(
        36 * (2 * layer * (prompt + n) + 4 * 4096 * _pairs(prompt + n, 0)) + 2 * 4096 * spec.vocab_size * n
        for n in responses
    )
    assert cost.of_copies(tree) == pytest.approx(alone, rel=1e-12)


def test_a_shared_prompt_is_worth_seven_times_less_work_at_100k_and_six_at_32k() -> None:
    run = lambda n: Run("x", np.zeros(n, np.int64), np.zeros(0, np.int64), 0)  # noqa: E731
    for length, least in ((100_000, 7.0), (32_000, 6.0)):
        tree = Tree(run(length), tuple(run(1000) for _ in range(8)))
        assert least - 0.3 <= COST.of_copies(tree) / COST.of(tree) <= 8


@pytest.mark.parametrize("seed", range(2))
def test_data_parallel_ranks_have_as_much_to_do_and_micro_batches_are_full(seed: int) -> None:
    trees = long_context_trees(256, seed)
    ranks = balance(trees, num_ranks=8, room=BUDGET, cost=COST)
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(tree.name for batch in batches for tree in batch) == sorted(tree.name for tree in trees)
    tokens = [sum(tree.num_tokens for tree in batch) for batch in batches]
    assert max(tokens) <= BUDGET and sum(tokens) >= 0.95 * len(batches) * BUDGET
    loads = [sum(COST.of(tree) for batch in rank for tree in batch) for rank in ranks]
    assert max(loads) * 8 / sum(loads) <= 1.10
    for rank in ranks:  # the costliest first
        costs = [sum(COST.of(tree) for tree in batch) for batch in rank]
        assert costs == sorted(costs, reverse=True)


def test_fewer_trees_than_ranks_and_many_small_ones() -> None:
    few = balance(long_context_trees(3, 0), num_ranks=8, room=BUDGET, cost=COST)
    assert sorted(len(rank) for rank in few) == [0, 0, 0, 0, 0, 1, 1, 1]
    small = balance(long_context_trees(40, 1, group_size=1), num_ranks=4, room=1_500_000, cost=COST)
    assert all(len(rank) == 1 for rank in small)  # they fit into one micro-batch, and are spread nevertheless


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_context_parallel_ranks_have_as_much_to_do(cp: int) -> None:
    for rank in balance(long_context_trees(64, 0), num_ranks=1, room=BUDGET, cost=COST):
        for trees in rank:
            spans = spans_of(trees)
            loads = _loads(spans, cp, COST)
            assert max(loads) * cp / sum(loads) <= 1.05


def _loads(spans: tuple[TreeSpans, ...], cp: int, cost: Cost) -> list[float]:
    loads = [0.0] * cp
    for segment in deal(spans, cp=cp, unit=1, cost=cost):
        tree = spans[segment.tree]
        run: Span = tree.trunk if segment.branch == TRUNK else tree.branches[segment.branch]
        first = segment.place.start - run.start + (0 if segment.branch == TRUNK else tree.trunk.length)
        n = segment.place.length
        loads[segment.rank] += cost.token * n + cost.pair * (n * first + n * (n + 1) / 2)
    return loads

"""Micro-batches: every loss token once, with its own context, on whichever rank. Read from the calls of attention."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from packing_samples import groups, micro_batches, trajectory, whole

from megatron_dgrpo.errors import DataError
from megatron_dgrpo.packing.cost import Cost
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trees import documents, trees


def _pairs(ranks: list[Layout]) -> dict[int, list[int]]:
    """What each token of a micro-batch sees, read from the calls of all ranks; each pair must be in one call."""
    seen: dict[int, list[int]] = defaultdict(list)
    for rank, layout in enumerate(ranks):
        calls = [(rank, 0, call) for call in layout.attention.calls]
        for piece in layout.attention.pieces:
            calls += [(other, piece.window.start, call) for other, call in piece.calls]
            assert all(call.key.stop <= piece.window.length for _, call in piece.calls)
        for other, offset, call in calls:
            size, keys = call.query.length // call.count, call.key.length // call.count
            for part in range(call.count):
                for q in range(size):
                    query = layout.place_S[call.query.start + part * size + q]
                    first = offset + call.key.start + part * keys
                    visible = keys if not call.causal else q + 1
                    assert query >= 0
                    seen[query] += ranks[other].place_S[first : first + visible].tolist()
    for keys in seen.values():
        assert len(set(keys)) == len(keys) and min(keys) >= 0
    return seen


def _check(batches: list[list[Layout]], expected: list[tuple[list[int], int]]) -> None:
    """`batches` lists the micro-batches of all data-parallel ranks, each with its context-parallel ranks' layouts."""
    found: dict[int, tuple[list[int], int]] = {}
    for ranks in batches:
        seen = _pairs(ranks)
        tokens, positions = {}, {}
        for layout in ranks:
            real = layout.place_S >= 0
            assert not real[len(real) - layout.num_padding :].any() and real[: len(real) - layout.num_padding].all()
            tokens.update(zip(layout.place_S[real], layout.tokens_S[real], strict=True))
            positions.update(zip(layout.place_S[real], layout.positions_S[real], strict=True))
        for layout in ranks:
            rows = zip(layout.row_hidden_R, layout.row_target_R, layout.row_stream_R, strict=True)
            for hidden, target, stream in rows:
                context = sorted(seen[layout.place_S[hidden]], key=lambda place: positions[place])
                assert [positions[place] for place in context] == list(range(len(context)))
                assert stream not in found
                found[int(stream)] = [int(tokens[place]) for place in context], int(target)
    assert [found[i] for i in range(len(found))] == expected


def test_rows_point_at_the_token_before_each_sampled_token() -> None:
    (layout,) = micro_batches(
        documents([trajectory("a", 0, [5, 6], ([7, 8], True), ([9], False), ([10], True))]), max_tokens=16
    )
    assert layout.tokens_S.tolist() == [5, 6, 7, 8, 9, 10]
    assert layout.row_hidden_R.tolist() == [1, 2, 4]  # the tool's token 9 is no target, and predicts the 10
    assert layout.row_target_R.tolist() == [7, 8, 10]
    assert layout.row_stream_R.tolist() == [0, 1, 2]


def test_the_last_token_of_a_prompt_predicts_the_first_one_of_every_response() -> None:
    responses = [trajectory("a", i, [5, 6], ([7 + i] * (i + 1), True)) for i in range(3)]
    (layout,) = micro_batches(trees(responses), max_tokens=16)
    assert layout.tokens_S.tolist() == [5, 6, 7, 8, 8, 9, 9, 9]
    assert layout.positions_S.tolist() == [0, 1, 2, 2, 3, 2, 3, 4]
    assert layout.row_hidden_R.tolist() == [1, 1, 3, 1, 5, 6]
    assert layout.row_target_R.tolist() == [7, 8, 8, 9, 9, 9]
    assert [(c.query.start, c.query.length, c.key.length, c.causal) for c in layout.attention.calls] == [
        (0, 2, 2, True), (2, 1, 1, True), (3, 2, 2, True), (5, 3, 3, True), (2, 6, 2, False),
    ]  # fmt: skip


@pytest.mark.parametrize("form", [documents, trees])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_every_loss_token_is_packed_once_with_its_own_context(form, size: int, cp: int, multiple_of: int) -> None:
    trajectories = groups(6)
    ranks = [
        [
            micro_batches(
                form(trajectories), max_tokens=60, multiple_of=multiple_of, rank=rank, dp=size, cp_rank=cp_rank,
                cp=cp, cost=Cost(1.0, 0.01), piece_tokens=5,
            )
            for cp_rank in range(cp)
        ]
        for rank in range(size)
    ]  # fmt: skip
    batches = [list(batch) for shards in ranks for batch in zip(*shards, strict=True)]
    assert len({len(shards[0]) for shards in ranks}) == 1  # as many on every data-parallel rank
    for layouts in batches:
        assert len({tuple(piece.window for piece in layout.attention.pieces) for layout in layouts}) == 1
        assert all(layout.num_tokens % multiple_of == 0 and layout.num_tokens > 0 for layout in layouts)
        assert sum(layout.num_tokens - layout.num_padding for layout in layouts) <= 60
    _check(batches, whole(trajectories))
    packing = Packing(60, dp=size, cp=cp, multiple_of=multiple_of, cost=Cost(1.0, 0.01))
    for (rank, cp_rank), rows in packing.rows(form(trajectories)).items():  # what a rank says of any other
        mine = np.concatenate([layout.row_stream_R for layout in ranks[rank][cp_rank]])
        assert sorted(mine.tolist()) == sorted(rows.tolist())


def test_a_group_that_is_too_large_becomes_several_trees() -> None:
    responses = [trajectory("a", i, [1] * 10, ([i + 1] * 6, True)) for i in range(8)]
    layouts = micro_batches(trees(responses), max_tokens=30)
    assert [layout.num_tokens for layout in layouts] == [28, 28, 22]  # 3 + 3 + 2 responses, the prompt with each
    _check([[layout] for layout in layouts], whole(responses))


def test_a_prompt_is_shared_only_where_its_tokens_are_the_same() -> None:
    found = trees([trajectory("a", 0, [1, 2], ([3], True)), trajectory("a", 1, [1, 9], ([3], True))])
    assert [len(tree.branches) for tree in found] == [1, 1]


def test_a_teacher_with_a_prompt_of_its_own_has_the_same_stream_indices_and_targets() -> None:
    student = groups(4)
    teacher = [replace(t, prompt_tokens=np.append(t.prompt_tokens, [3, 1, 4]).astype(np.int32)) for t in student]
    rows = []
    for trajectories in (student, teacher):
        layouts = micro_batches(trees(trajectories), max_tokens=80)
        pairs = [zip(layout.row_stream_R, layout.row_target_R, strict=True) for layout in layouts]
        rows.append(sorted((int(stream), int(target)) for pair in pairs for stream, target in pair))
    assert rows[0] == rows[1]


def test_a_rank_without_trees_gets_a_micro_batch_without_rows() -> None:
    (layout,) = micro_batches([], max_tokens=64, multiple_of=4)
    assert layout.num_tokens == 4 == layout.num_padding and len(layout.row_hidden_R) == 0
    assert layout.attention.calls == ()
    assert len(micro_batches([], max_tokens=64, rounds_of=3)) == 3


def test_too_long_names_the_sample_and_the_setting() -> None:
    samples = [trajectory("a", 0, [1], ([2], True)), trajectory("b", 0, [1] * 8, ([2], True))]
    for form in (documents, trees):
        with pytest.raises(DataError, match=r"(?s)micro_batch_tokens=8.*sample 0 of prompt b has 9 tokens"):
            micro_batches(form(samples), max_tokens=8)


@pytest.mark.parametrize("form", [documents, trees])
def test_sequences_that_cannot_be_trained_on(form) -> None:
    with pytest.raises(DataError, match="sample 3 of prompt a has no token to train on"):
        form([trajectory("a", 3, [1, 2])])
    with pytest.raises(DataError, match="sample 3 of prompt a has no prompt"):
        form([trajectory("a", 3, [], ([1, 2], True))])


def test_equal_batches_are_packed_alike_on_every_rank() -> None:
    ranks = [micro_batches(trees(groups(9)), max_tokens=100, rank=r, dp=3, cost=Cost(1.0, 0.1)) for r in range(3)]
    streams = np.concatenate([layout.row_stream_R for layouts in ranks for layout in layouts])
    assert sorted(streams.tolist()) == list(range(len(whole(groups(9)))))

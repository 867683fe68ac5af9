from __future__ import annotations

import numpy as np
import pytest

from megatron_dgrpo.errors import DataError
from megatron_dgrpo.packing.pack import from_trajectories, pack, sequence, share
from megatron_dgrpo.packing.trajectory import Segment, Trajectory


def _trajectory(name: str, prompt: list[int], *segments: tuple[list[int], bool]) -> Trajectory:
    parts = tuple(Segment(np.asarray(tokens, np.int32), trained) for tokens, trained in segments)
    return Trajectory(name, 0, np.asarray(prompt, np.int32), parts, "stop")


def _random(count: int, longest: int = 30) -> list[Trajectory]:
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(1, 1000, n).tolist()  # noqa: E731
    return [
        _trajectory(
            str(i),
            ids(draw.integers(1, longest)),
            (ids(draw.integers(1, 9)), True),
            (ids(draw.integers(1, 4)), False),
            (ids(draw.integers(1, 9)), True),
        )
        for i in range(count)
    ]


def test_rows_point_at_the_token_before_each_sampled_token() -> None:
    (layout,) = pack(
        from_trajectories([_trajectory("a", [5, 6], ([7, 8], True), ([9], False), ([10], True))]), max_tokens=16
    )
    assert layout.tokens_S.tolist() == [5, 6, 7, 8, 9, 10]
    assert layout.row_hidden_R.tolist() == [1, 2, 4]  # the tool's token 9 is no target, and predicts the 10
    assert layout.row_target_R.tolist() == [7, 8, 10]
    assert layout.row_stream_R.tolist() == [0, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_every_loss_token_is_packed_once_with_its_own_context(ranks: int, multiple_of: int) -> None:
    trajectories = _random(5)
    streams: dict[int, int] = {}
    for rank in range(ranks):
        for layout in pack(share(from_trajectories(trajectories), rank, ranks), max_tokens=60, multiple_of=multiple_of):
            assert layout.num_tokens <= 60 and layout.num_tokens % multiple_of == 0
            ends = [d.start + d.length for d in layout.documents]
            assert [0, *ends[:-1]] == [d.start for d in layout.documents] and ends[-1] == layout.num_tokens
            for hidden, target, stream in zip(
                layout.row_hidden_R, layout.row_target_R, layout.row_stream_R, strict=True
            ):
                assert layout.tokens_S[hidden + 1] == target
                assert layout.positions_S[hidden + 1] == layout.positions_S[hidden] + 1  # in the same document
                assert stream not in streams
                streams[int(stream)] = int(target)
    expected = np.concatenate([s.tokens for t in trajectories for s in t.segments if s.trained])
    assert [streams[i] for i in range(len(streams))] == expected.tolist()


def test_a_rank_without_sequences_gets_a_micro_batch_without_rows() -> None:
    (layout,) = pack([], max_tokens=64, multiple_of=4)
    assert layout.num_tokens == 4 == layout.num_padding and len(layout.row_hidden_R) == 0


def test_shares_are_balanced() -> None:
    sequences = from_trajectories(_random(64))
    loads = [sum(len(s.tokens_T) for s in share(sequences, rank, 4)) for rank in range(4)]
    assert max(loads) / (sum(loads) / 4) < 1.05


def test_too_long_names_the_sample_and_the_setting() -> None:
    with pytest.raises(DataError, match=r"(?s)micro_batch_tokens=8.*sample 0 of prompt b has 9 tokens"):
        pack(
            from_trajectories([_trajectory("a", [1], ([2], True)), _trajectory("b", [1] * 8, ([2], True))]),
            max_tokens=8,
        )


@pytest.mark.parametrize(("trained", "what"), [([0, 0], "no token to train on"), ([1, 0], "no prompt")])
def test_sequences_that_cannot_be_trained_on(trained: list[int], what: str) -> None:
    with pytest.raises(DataError, match=what):
        sequence("x", np.asarray([1, 2]), np.asarray(trained, bool), 0)

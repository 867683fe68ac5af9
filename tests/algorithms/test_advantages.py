import math
import statistics

import numpy as np
import pytest

from megatron_dgrpo.algorithms.advantages import group_advantages
from megatron_dgrpo.errors import ObjectiveError

REWARDS = [1.0, 0.0, 0.0, 0.25, 3.0, -1.0, 0.5]
PROMPTS = [4, 4, 9, 4, 9, 9, 9]  # ragged groups, interleaved


def of_prompt(prompt):
    return [r for r, p in zip(REWARDS, PROMPTS, strict=True) if p == prompt]


@pytest.mark.parametrize("std, deviation", [("population", statistics.pstdev), ("sample", statistics.stdev)])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
def test_std_divides_by_the_named_deviation_plus_epsilon(std, deviation, epsilon):
    got = group_advantages(REWARDS, PROMPTS, std=std, epsilon=epsilon)
    for value, reward, prompt in zip(got.values_N, REWARDS, PROMPTS, strict=True):
        group = of_prompt(prompt)
        assert value == pytest.approx((reward - statistics.fmean(group)) / (deviation(group) + epsilon), rel=1e-13)
    assert (got.num_groups, got.num_equal_groups) == (2, 0)


def test_mean_only():
    got = group_advantages(REWARDS, PROMPTS, kind="mean").values_N
    expected = [r - statistics.fmean(of_prompt(p)) for r, p in zip(REWARDS, PROMPTS, strict=True)]
    assert got == pytest.approx(expected, rel=1e-13)


def test_leave_one_out_compares_with_the_others():
    got = group_advantages(REWARDS, PROMPTS, kind="leave_one_out").values_N
    for i, value in enumerate(got):
        others = [REWARDS[j] for j in range(len(REWARDS)) if j != i and PROMPTS[j] == PROMPTS[i]]
        assert value == pytest.approx(REWARDS[i] - statistics.fmean(others), rel=1e-13)


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
@pytest.mark.parametrize(
    "rewards", [[0.0] * 8, [0.1] * 3, [0.7] * 7, [0.1 + 0.2, 0.3, 0.3], [1e9 / 3] * 5, [-0.1] * 6, [5.0]]
)
def test_equal_rewards_have_exactly_no_advantage(kind, rewards):
    """The mean of [0.1] * 3 is not 0.1, and with epsilon 0 two rounding errors would make an advantage of 1."""
    got = group_advantages([*rewards, 1.0, 2.0], [0] * len(rewards) + [1, 1], kind=kind, epsilon=0.0)
    assert (got.values_N[: len(rewards)] == 0.0).all()
    assert (got.values_N[-2:] != 0).all()
    assert (got.num_groups, got.num_equal_groups) == (2, 1)


def test_small_differences_are_differences():
    assert group_advantages([1.0, 1.0 + 1e-9], [0, 0], epsilon=0.0).values_N == pytest.approx([-1, 1], rel=1e-6)


def test_advantages_do_not_depend_on_the_order():
    order = np.random.default_rng(0).permutation(len(REWARDS))
    got = group_advantages(np.array(REWARDS)[order], np.array(PROMPTS)[order]).values_N
    assert got == pytest.approx(group_advantages(REWARDS, PROMPTS).values_N[order], rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rewards_are_all_named(bad):
    with pytest.raises(ObjectiveError) as raised:
        group_advantages([1.0, bad, 0.0, bad], [0, 0, 7, 7])
    assert "sample 1 (prompt 0)" in str(raised.value) and "sample 3 (prompt 7)" in str(raised.value)
    with pytest.raises(ObjectiveError, match="prompt 'b', sample 3"):
        group_advantages([1.0, bad], [0, 0], names=["prompt 'a', sample 0", "prompt 'b', sample 3"])


def test_shapes_and_names_are_checked():
    with pytest.raises(ObjectiveError, match="one reward and one prompt"):
        group_advantages([1.0, 2.0], [0])
    with pytest.raises(ObjectiveError, match="std, mean or leave_one_out"):
        group_advantages([1.0, 2.0], [0, 0], kind="median")
    assert group_advantages([], []).values_N.shape == (0,)

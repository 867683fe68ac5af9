"""What becomes of scores and failures: weighted totals, skipped prompts, zeros, the end of a run."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Failure, Sample
from megatron_dgrpo.rewards.compose import settle, total

SAMPLES = [Sample(f"p{i // 2}", f"text {i}") for i in range(8)]
NUM = 4
GOOD = [float(i) for i in range(8)]


def reward(**changes: Any) -> settings.ExactMatch:
    return settings.ExactMatch(kind="exact_match", **changes)


def failing(*places: int) -> list[float | Failure]:
    return [Failure("it hung") if i in places else value for i, value in enumerate(GOOD)]


def test_each_reward_by_name_and_the_weighted_total() -> None:
    rewards = [reward(weight=2.0), reward(name="short", weight=-0.25)]
    settled = settle(rewards, [GOOD, GOOD[::-1]], SAMPLES, num_prompts=NUM)
    assert settled.scores[1] == {"exact_match": 1.0, "short": 6.0}
    assert settled.kept == [True] * 8 and settled.failed == {} and settled.words == "" and settled.num_skipped == 0
    assert total(rewards, settled.scores[1]) == 0.5
    for wrong in ({}, {"exact_match": 1.0}, {"exact_match": 1.0, "short": 1.0, "other": 1.0}):
        with pytest.raises(RewardError, match="the total needs"):
            total(rewards, wrong)


def test_a_failure_leaves_out_the_whole_prompt_and_is_counted() -> None:
    settled = settle([reward(), reward(name="b")], [GOOD, failing(3)], SAMPLES, num_prompts=NUM)
    assert settled.kept == [True, True, False, False, True, True, True, True]
    assert settled.failed == {"b": 1} and settled.num_skipped == 1
    assert settled.words.splitlines() == [
        "rewards failed (b on 1 of 8 responses; 1 prompts are left out):",
        "  - b: it hung; on p1 with the response 'text 3'",
    ]


def test_a_failure_is_zero_where_the_settings_say_so() -> None:
    settled = settle([reward(on_failure="zero")], [failing(1, 2, 3, 4, 5, 6, 7)], SAMPLES, num_prompts=NUM)
    assert [scores["exact_match"] for scores in settled.scores] == [0.0] * 8
    assert all(settled.kept) and settled.failed == {"exact_match": 7} and "and 2 more" in settled.words


def test_a_failure_ends_the_run_where_the_settings_say_so() -> None:
    with pytest.raises(RewardError, match=r"(?s)end the run then.*strict: it hung; on p0 with the response 'text 1'$"):
        settle(
            [reward(name="strict", on_failure="error"), reward()], [failing(1), failing(2)], SAMPLES, num_prompts=NUM
        )


def test_too_many_prompts_left_out_end_the_run() -> None:
    assert settle([reward()], [failing(0, 1, 2)], SAMPLES, num_prompts=NUM).num_skipped == 2  # half of them
    with pytest.raises(RewardError, match="to 3 of 4 prompts, which is more than half"):
        settle([reward()], [failing(0, 2, 4)], SAMPLES, num_prompts=NUM)
    with pytest.raises(RewardError, match="to 1 of 1 prompts"):
        settle([reward()], [[Failure("x")]], SAMPLES[:1], num_prompts=1)


def test_prompts_that_other_parts_of_the_step_left_out_count() -> None:
    part = SAMPLES[:2]
    assert settle([reward()], [failing(0)[:2]], part, num_prompts=4, skipped_before=1).num_skipped == 1
    with pytest.raises(RewardError, match="to 3 of 4 prompts"):
        settle([reward()], [failing(0)[:2]], part, num_prompts=4, skipped_before=2)

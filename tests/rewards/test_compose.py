from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from megatron_dgrpo.config import schema
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.errors import ConfigError, RewardError
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.compose import Rewards

ROWS = [PromptRow(f"d.jsonl:{n}", f"p{n}", f"v{n}") for n in range(4)]
TEXTS = ["v0", "v0", "v2", ""]


@dataclass
class Custom:
    function: Callable[[Sample], Any]
    name: str = "custom"

    def score(self, samples: Sequence[Sample]) -> Any:
        return [self.function(sample) for sample in samples]


def test_each_reward_by_name_and_the_weighted_total() -> None:
    length = Custom(lambda s: np.float32(len(s.text)), "length")
    rewards = Rewards.of([(Custom(lambda s: s.text == s.row.answer, "match"), 2.0), (length, -0.25)])
    scores = rewards.score(ROWS, TEXTS)
    assert scores == {"match": [1.0, 0.0, 1.0, 0.0], "length": [2.0, 2.0, 2.0, 0.0]}
    assert all(type(v) is float for values in scores.values() for v in values)
    assert rewards.total({"match": 1.0, "length": 2.0}) == 1.5
    assert rewards.total({"length": 2.0, "match": 0.0}) == -0.5


def test_from_a_config() -> None:
    rewards = Rewards((schema.Reward(kind="exact_match", weight=0.5),))
    scores = rewards.score(ROWS, TEXTS)
    assert scores == {"exact_match": [1.0, 0.0, 1.0, 0.0]}
    assert rewards.total({"exact_match": 1.0}) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -np.inf, None, "1.0", "high", [1.0], 10**400])
def test_a_number_that_is_none_names_reward_and_sample(value: Any) -> None:
    rewards = Rewards.of([(Custom(lambda s: value if s.row.name == "d.jsonl:2" else 1.0), 1.0)])
    with pytest.raises(RewardError) as caught:
        rewards.score(ROWS, TEXTS)
    message = str(caught.value)
    assert "reward custom" in message and "1 of 4" in message
    assert "d.jsonl:2" in message and "'v2'" in message and "d.jsonl:1" not in message


def test_a_reward_that_raises_names_the_sample_and_keeps_the_cause() -> None:
    rewards = Rewards.of([(Custom(lambda s: {"": 1 // 0}[s.text] if s.text == "" else 1.0), 1.0)])
    with pytest.raises(
        RewardError, match=r"reward custom raised ZeroDivisionError.*d\.jsonl:3 with the response ''"
    ) as caught:
        rewards.score(ROWS, TEXTS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_reward_that_fails_only_on_the_batch() -> None:
    class Batchwise(Custom):
        def score(self, samples: Sequence[Sample]) -> Any:
            if len(samples) > 1:
                raise TimeoutError("too many")
            return [1.0]

    with pytest.raises(RewardError, match=r"TimeoutError.*4 samples together.*d\.jsonl:0"):
        Rewards.of([(Batchwise(len), 1.0)]).score(ROWS, TEXTS)


def test_too_few_or_too_many_numbers() -> None:
    class Short(Custom):
        def score(self, samples: Sequence[Sample]) -> Any:
            return [1.0] * (len(samples) - 1)

    with pytest.raises(RewardError, match="gave 3 numbers for 4 samples"):
        Rewards.of([(Short(len), 1.0)]).score(ROWS, TEXTS)


def test_rewards_that_cannot_be_summed() -> None:
    one, two = (schema.Reward(kind="exact_match"),) * 2
    with pytest.raises(ConfigError, match="exact_match is there 2 times"):
        Rewards((one, two))
    with pytest.raises(ConfigError, match="there are none"):
        Rewards(())
    with pytest.raises(ConfigError, match="custom has the weight inf"):
        Rewards.of([(Custom(len), math.inf)])
    for scores in ({}, {"custom": 1.0, "other": 1.0}):
        with pytest.raises(RewardError, match="the total needs"):
            Rewards.of([(Custom(len), 1.0)]).total(scores)

"""Several named rewards as one: each kept by its name, the total their weighted sum.

A reward that fails is never counted as 0. It ends the run with the reward's name and the sample that it failed on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dgrpo.config import schema
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.errors import ConfigError, RewardError, listing
from megatron_dgrpo.rewards.base import Reward, Sample
from megatron_dgrpo.rewards.exact_match import ExactMatch

_KINDS = {"exact_match": ExactMatch}
_LISTED = 5


class Rewards:
    def __init__(self, settings: Sequence[schema.Reward]) -> None:
        self._setup([(_KINDS[one.kind](), one.weight) for one in settings])

    @classmethod
    def of(cls, weighted: Sequence[tuple[Reward, float]]) -> Rewards:
        """From rewards that exist already."""
        rewards = cls.__new__(cls)
        rewards._setup(weighted)
        return rewards

    def _setup(self, weighted: Sequence[tuple[Reward, float]]) -> None:
        names = [reward.name for reward, _ in weighted]
        problems = [
            f"{name} is there {names.count(name)} times: sum their weights in one"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        problems += [
            f"{reward.name} has the weight {weight}: it must be finite"
            for reward, weight in weighted
            if not math.isfinite(weight)
        ]
        if problems or not names:
            raise ConfigError(listing("rewards can't be summed:", problems or ["there are none"]))
        self._rewards = [reward for reward, _ in weighted]
        self.weights = {reward.name: weight for reward, weight in weighted}

    def score(self, rows: Sequence[PromptRow], texts: Sequence[str]) -> dict[str, list[float]]:
        """By the reward's name, a number for each response, before weighting."""
        samples = [Sample(row, text) for row, text in zip(rows, texts, strict=True)]
        return {reward.name: _score(reward, samples) for reward in self._rewards}

    def total(self, scores: Mapping[str, float]) -> float:
        """The weighted sum of one response's rewards."""
        if scores.keys() != self.weights.keys():
            raise RewardError(f"a sample was scored by {sorted(scores)}, and the total needs {sorted(self.weights)}")
        return math.fsum(weight * scores[name] for name, weight in self.weights.items())


def _score(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    try:
        values = list(reward.score(samples))
    except Exception as error:
        raise RewardError(
            f"reward {reward.name} raised {error!r} on {_culprit(reward, samples)}: correct the reward"
        ) from error
    if len(values) != len(samples):
        raise RewardError(
            f"reward {reward.name} gave {len(values)} numbers for {len(samples)} samples: it must give one for each"
        )
    numbers = [_number(value) for value in values]
    wrong = [
        f"{value!r} for {_named(sample)}"
        for value, number, sample in zip(values, numbers, samples, strict=True)
        if number is None
    ]
    if wrong:
        more = [f"and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        title = f"reward {reward.name} must give finite numbers, and gave for {len(wrong)} of {len(samples)} samples:"
        raise RewardError(listing(title, wrong[:_LISTED] + more))
    return [number for number in numbers if number is not None]


def _number(value: Any) -> float | None:
    """The value as a finite float; None for what is not one. Text is not, even if it could be read as one."""
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _culprit(reward: Reward, samples: Sequence[Sample]) -> str:
    """Which sample it fails on: each is tried alone."""
    for sample in samples:
        try:
            reward.score([sample])
        except Exception:
            return _named(sample)
    return (
        f"{len(samples)} samples together, {_named(samples[0])} the first (none fails alone)"
        if samples
        else "no samples"
    )


def _named(sample: Sample) -> str:
    text = sample.text if len(sample.text) <= 80 else f"{sample.text[:77]}..."
    return f"{sample.row.name} with the response {text!r}"

"""Several named rewards as one: each kept by its name, the total their weighted sum; and what becomes of failures.

A failure is never a number unless the reward's `on_failure` makes it one. With `skip`, the whole group of a prompt
goes: the advantages of a group without one of its members would depend on which responses a reward happens to fail on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_dgrpo.config.rewards import AnyReward
from megatron_dgrpo.errors import RewardError, listing
from megatron_dgrpo.rewards.base import Failure, Sample

_LISTED = 5
MOST_SKIPPED = 0.5
"""A larger share of prompts skipped ends the run: a step of what is left would be another one than was asked for."""


@dataclass(frozen=True)
class Settled:
    scores: list[dict[str, float]]
    """By the reward's name, before weighting, for each sample."""
    kept: list[bool]
    """Which samples are of use."""
    failed: dict[str, int]
    """How many samples each reward failed on; rewards that never did are left out."""
    num_skipped: int
    """Prompts."""
    words: str
    """What to tell the user; empty when nothing failed."""


def settle(
    rewards: Sequence[AnyReward],
    found: Sequence[Sequence[float | Failure]],
    samples: Sequence[Sample],
    *,
    num_prompts: int,
    skipped_before: int = 0,
) -> Settled:
    """Scores out of what the pool found. Failures are dealt with as the settings say: they may end the run.

    The samples may be a part of a step's, which has `num_prompts`, of which others have skipped so many already.
    """
    failed: Counter[str] = Counter()
    skipped: set[str] = set()
    fatal: list[str] = []
    told: list[str] = []
    scores: list[dict[str, float]] = [{} for _ in samples]
    for reward, row in zip(rewards, found, strict=True):
        for sample, value, of_sample in zip(samples, row, scores, strict=True):
            if isinstance(value, Failure):
                failed[reward.label] += 1
                sentence = f"{reward.label}: {value.why}; on {_named(sample)}"
                (fatal if reward.on_failure == "error" else told).append(sentence)
                if reward.on_failure == "skip":
                    skipped.add(sample.name)
            of_sample[reward.label] = 0.0 if isinstance(value, Failure) else float(value)
    if fatal:
        raise RewardError(listing("a reward failed, and its settings ask to end the run then:", _short(fatal)))
    if len(skipped) + skipped_before > MOST_SKIPPED * num_prompts:
        together = len(skipped) + skipped_before
        title = f"rewards failed on responses to {together} of {num_prompts} prompts, which is more than half:"
        raise RewardError(listing(title, _short(told)))
    words = ""
    if told:
        counts = ", ".join(f"{name} on {count}" for name, count in failed.items())
        title = f"rewards failed ({counts} of {len(samples)} responses; {len(skipped)} prompts are left out):"
        words = listing(title, _short(told))
    return Settled(scores, [sample.name not in skipped for sample in samples], dict(failed), len(skipped), words)


def total(rewards: Sequence[AnyReward], scores: Mapping[str, float]) -> float:
    """The weighted sum of one response's rewards."""
    weights = {reward.label: reward.weight for reward in rewards}
    if scores.keys() != weights.keys():
        raise RewardError(f"a response was scored by {sorted(scores)}, and the total needs {sorted(weights)}")
    return math.fsum(weight * scores[name] for name, weight in weights.items())


def _short(sentences: Sequence[str]) -> list[str]:
    more = [f"and {len(sentences) - _LISTED} more"] if len(sentences) > _LISTED else []
    return [*sentences[:_LISTED], *more]


def _named(sample: Sample) -> str:
    text = sample.text if len(sample.text) <= 80 else f"{sample.text[:77]}..."
    return f"{sample.name} with the response {text!r}"

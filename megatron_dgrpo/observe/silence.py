"""Steps whose rewards teach nothing: every group's are equal.

Where no other term has a say, such a step has no gradient at all, which is no error: the next one may have. Several in
a row are worth a word. Where a teacher has a say, rewards that stay equal for longer are worth one, too: the run goes
on as distillation alone.
"""

from __future__ import annotations

from collections.abc import Mapping

_AFTER = 3
"""Steps in a row before the first word; each further one after twice as many."""
_AFTER_TAUGHT = 10
"""The same where another term has a say."""


class SilentSteps:
    """Of one stage. `rewarded`: whether any reward has a weight; without one a teacher alone is what was asked for."""

    def __init__(self, *, rewarded: bool = True) -> None:
        self._rewarded = rewarded
        self._count = self._equal = 0
        self._next, self._next_equal = _AFTER, _AFTER_TAUGHT

    def observe(self, facts: Mapping[str, float], factors: Mapping[str, float]) -> str | None:
        """What to tell after a step with these figures and these factors of its terms; mostly nothing."""
        if facts["equal_groups"] < facts["groups"]:
            self._equal, self._next_equal = 0, _AFTER_TAUGHT
        else:
            self._equal += 1
        others = any(factor != 0 for name, factor in factors.items() if name != "surrogate")
        if others or facts["equal_groups"] < facts["groups"]:
            self._count, self._next = 0, _AFTER
            return self._taught_alone(facts) if others else None
        self._count += 1
        if self._count < self._next:
            return None
        self._next *= 2
        return (
            f"warning: {self._count} steps in a row without anything to learn from: the responses to each prompt all "
            f"had the same reward (the last ones {facts['reward/mean']:g} on average), and no teacher has a say. "
            "Look at the rewards of the responses, take prompts that are neither too hard nor too easy, or raise "
            "group_size or sampling.temperature"
        )

    def _taught_alone(self, facts: Mapping[str, float]) -> str | None:
        if not self._rewarded or self._equal < self._next_equal:
            return None
        self._next_equal *= 2
        return (
            f"warning: {self._equal} steps in a row in which the responses to each prompt all had the same reward (the "
            f"last ones {facts['reward/mean']:g} on average): only the other terms of the objective teach. Look at the "
            "rewards of the responses, and at the prompts' difficulty"
        )

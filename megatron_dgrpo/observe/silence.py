"""A run that computes and learns nothing: every group's rewards are equal, and no other term has a say.

Such a step has no gradient, which is no error: the next one may have. Several in a row are worth a word.
"""

from __future__ import annotations

from collections.abc import Mapping

_AFTER = 3
"""Steps in a row before the first word; each further one after twice as many."""


class SilentSteps:
    """Of one stage."""

    def __init__(self) -> None:
        self._count = 0
        self._next = _AFTER

    def observe(self, facts: Mapping[str, float], factors: Mapping[str, float]) -> str | None:
        """What to tell after a step with these figures and these factors of its terms; mostly nothing."""
        others = any(factor != 0 for name, factor in factors.items() if name != "surrogate")
        if others or facts["equal_groups"] < facts["groups"]:
            self._count, self._next = 0, _AFTER
            return None
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

"""What a reward is: a name, and numbers for samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_dgrpo.data.rows import PromptRow


@dataclass(frozen=True)
class Sample:
    """A response to a prompt, as text without the token that ended it."""

    row: PromptRow
    text: str


class Reward(Protocol):
    @property
    def name(self) -> str:
        """What its figures are called in trajectories and metrics."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float]:
        """One finite number for each sample, in their order."""

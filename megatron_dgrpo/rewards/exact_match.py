"""1 when the response is the answer, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dgrpo.rewards.base import Sample


@dataclass(frozen=True)
class ExactMatch:
    """White space at both ends apart, every character counts."""

    name: str = "exact_match"

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(sample.text.strip() == sample.row.answer.strip()) for sample in samples]

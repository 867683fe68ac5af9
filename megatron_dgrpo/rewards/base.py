"""What a reward is given, and what it may answer. Imports nothing heavy: a worker starts with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_dgrpo.config.rewards import Referenced
from megatron_dgrpo.errors import RewardError


@dataclass(frozen=True)
class Sample:
    """A response to a prompt, as text without the token that ended it."""

    name: str
    """Of the prompt; the responses to one prompt share it."""
    text: str
    prompt: str = ""
    answer: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Of the row: those that the reward asks for."""

    def field_of(self, name: str) -> Any:
        if name not in self.fields:
            raise RewardError(f"the row has no field {name!r}; name another one in the reward's settings")
        return self.fields[name]


@dataclass(frozen=True)
class Failure:
    """In the place of a number: why there is none."""

    why: str


Report = Callable[[int, "float | Failure"], None]
"""Takes the number, or the failure, of the sample at an index."""


class Scorer(Protocol):
    """Made from its settings in a worker. It raises where it cannot judge; it never gives a number instead."""

    def score(self, sample: Sample) -> float: ...


class BatchScorer(Protocol):
    """One that works on many samples at once, and keeps to the deadline of each by itself."""

    def score_all(self, samples: Sequence[Sample], report: Report) -> None: ...


def references(settings: Referenced, sample: Sample) -> list[str]:
    """The texts of which any is right."""
    if settings.reference is None:
        if not sample.answer:
            raise RewardError("the row has no answer to compare with; name the field that has it (reference)")
        return [sample.answer]
    value = sample.field_of(settings.reference)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RewardError(
            f"the row's field {settings.reference!r} is {value!r:.80}: it must be a text or a list of texts"
        )
    return texts

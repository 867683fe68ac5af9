"""Responses to read: the samples of a run that the report shows, with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_SHOWN = 240
MAX_CHARACTERS = 12_000
"""Of a prompt or a response; what is left out of a longer one is its middle."""


@dataclass(frozen=True)
class Rollout:
    stage_number: int
    step: int
    prompt: str
    response: str
    rewards: dict[str, float]
    finish_reason: str
    num_tokens: int
    name: str = ""
    """Of the prompt."""


@dataclass(frozen=True)
class Rollouts:
    items: list[Rollout] = field(default_factory=list)
    note: str = ""
    """What there is to say about them; why there are none."""


def evenly[T](items: Sequence[T], count: int = MAX_SHOWN) -> list[T]:
    """So many of them, spread over the run, both ends among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def shortened(text: str, limit: int = MAX_CHARACTERS) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters are left out here ...]\n{text[-half:]}"


def shown(rollouts: Rollouts) -> dict[str, Any]:
    """For the page."""
    items = [
        {
            "stage": item.stage_number,
            "step": item.step,
            "name": item.name,
            "prompt": shortened(item.prompt),
            "response": shortened(item.response),
            "rewards": {name: f"{value:.4g}" for name, value in item.rewards.items()},
            "total": sum(item.rewards.values()),
            "finish": item.finish_reason,
            "tokens": item.num_tokens,
        }
        for item in evenly(rollouts.items)
    ]
    note = rollouts.note
    if len(rollouts.items) > len(items):
        note = f"{len(items)} of {len(rollouts.items):,} responses, spread over the run. {note}"
    return {"items": items, "note": note}


NONE = Rollouts(note="This run keeps no rollouts, so there are none to read here.")

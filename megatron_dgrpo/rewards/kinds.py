"""Which class scores which kind. Each is imported when a worker needs it."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import TypeAdapter

from megatron_dgrpo.config.rewards import AnyReward, Reward
from megatron_dgrpo.rewards.base import BatchScorer, Scorer

_CLASSES = {
    "exact_match": "text:ExactMatch",
    "contains": "text:Contains",
    "token_f1": "text:TokenF1",
    "regex": "text:Regex",
    "number": "number:Number",
    "choice": "choice:Choice",
    "math": "mathematics:Math",
    "json_valid": "json_form:JsonValid",
    "instructions": "instructions:Instructions",
    "code": "code:Code",
    "function": "function:Function",
    "judge": "judge:Judge",
}
_SETTINGS: TypeAdapter[AnyReward] = TypeAdapter(Reward)


def read_settings(text: str) -> AnyReward:
    return _SETTINGS.validate_json(text)


def build(config: AnyReward) -> Scorer | BatchScorer:
    """RewardError where it cannot work at all: a package, a file or a function is missing."""
    module, _, name = _CLASSES[config.kind].partition(":")
    made: Any = getattr(importlib.import_module(f"megatron_dgrpo.rewards.{module}"), name)(config)
    return made

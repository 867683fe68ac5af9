"""What one reward's settings must agree on. Each problem begins with the key below the reward's own path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from string import Formatter

from megatron_dgrpo.config.rewards import AnyReward, Instructions, Judge, Regex

_FILLED = ("prompt", "response", "answer", "fields")


def reward_problems(reward: AnyReward) -> Iterator[str]:
    match reward:
        case Regex():
            yield from _pattern("pattern", reward.pattern, groups=int(reward.equals_reference))
            if reward.reference and not reward.equals_reference:
                yield "reference: the pattern alone decides; set equals_reference=true, or remove the reference"
        case Judge():
            yield from _pattern("pattern", reward.pattern, groups=1)
            yield from _template(reward.template)
            if reward.lowest >= reward.highest:
                yield f"highest: {reward.highest:g} is not above lowest={reward.lowest:g}; set them to the scale's ends"
        case Instructions():
            if not reward.constraints and reward.field is None:
                yield "constraints: there are none; list some, or name the rows' field that has them (field)"
            for i, constraint in enumerate(reward.constraints):
                low, high = getattr(constraint, "at_least", 0), getattr(constraint, "at_most", None)
                if high is not None and high < low:
                    yield f"constraints.{i}.at_most: {high} is less than at_least={low}; no response can meet it"
        case _:
            return


def _pattern(key: str, pattern: str, groups: int) -> Iterator[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        yield f"{key}: {pattern!r} is no regular expression ({error}); correct it"
        return
    if compiled.groups < groups:
        yield f"{key}: {pattern!r} has no group; put what is compared or read in parentheses"


def _template(template: str) -> Iterator[str]:
    try:
        names = [re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        yield f"template: {error}; write a brace that is meant as such twice"
        return
    for name in dict.fromkeys(names):
        if name not in _FILLED:
            yield f"template: {{{name}}} is unknown; there are {', '.join(f'{{{n}}}' for n in _FILLED)}"
    if "response" not in names:
        yield "template: it does not show the response; put {response} into it"

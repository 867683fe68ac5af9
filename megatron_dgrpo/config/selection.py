"""Which prompts a stage of rewards asks for, and which of the groups it trains on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from megatron_dgrpo.config.frozen import Frozen


class Filter(Frozen):
    """Pass over prompts that were always solved, or never, at each of their last visits. A visit is a group: it is
    solved always where every response's reward (the weighted sum) is at least `always`, never where every one is at
    most `never`."""

    visits: PositiveInt = 2
    """So many visits in a row; from then on the prompt is not asked again in this stage."""
    always: float = 1.0
    """The least reward of a response that solves its prompt."""
    never: float = 0.0
    """The largest reward of a response that does not."""


class DynamicSampling(Frozen):
    """Replace groups whose responses all have the same reward by groups of further prompts, until the batch is full
    (DAPO). Such groups have no advantage; a teacher still learns from them, so that dgrpo keeps them by default."""

    rounds: PositiveInt = 10
    """Generations of a step at most, the first one included; each asks for as many prompts as the batch lacks."""
    when_short: Literal["fill", "stop"] = "fill"
    """After the last round: fill the batch with the first of the groups that were left out, or end the run."""


def problems(filter: Filter | None) -> Iterator[str]:
    """What is contradictory; each begins with the key, relative to the stage."""
    if filter is not None and filter.never >= filter.always:
        yield f"filter.never: {filter.never:g} is not below filter.always={filter.always:g}; lower it"

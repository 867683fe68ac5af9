"""What can be trained on: every response checked against the model and the micro-batch before anything is packed.

Nothing is cut short. What is too long is an error, or dropped, counted and listed, as the stage says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_dgrpo.errors import DataError, listing
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.packing.trees import name_of

OnOverlong = Literal["error", "drop"]


@dataclass(frozen=True)
class Limits:
    room: int  # tokens of a micro-batch
    room_setting: str  # what to change for more
    max_positions: int  # the model's context
    vocab_size: int


@dataclass(frozen=True)
class Fitting:
    trajectories: list[Trajectory]
    dropped: list[str]  # a sentence each


def keep_fitting(
    trajectories: Sequence[Trajectory], limits: Limits, on_overlong: OnOverlong, *, may_be_empty: bool = False
) -> Fitting:
    """Those that fit, at least one unless it `may_be_empty`. Ids that the model lacks are always an error."""
    strange, overlong, kept = [], [], []
    for trajectory in trajectories:
        tokens_T = np.concatenate([trajectory.prompt_tokens, trajectory.response_tokens])
        outside = tokens_T[(tokens_T < 0) | (tokens_T >= limits.vocab_size)]
        if len(outside):
            strange.append(f"{name_of(trajectory)} has the id {outside[0]}, of a vocabulary of {limits.vocab_size}")
        if problem := _too_long(len(tokens_T), limits):
            overlong.append(f"{name_of(trajectory)} has {len(tokens_T)} tokens, {problem}")
        else:
            kept.append(trajectory)
    if strange:
        raise DataError(listing("Ids that the model does not have; is this the tokenizer that belongs to it?", strange))
    if overlong and on_overlong == "error":
        raise DataError(listing("Too long to train on; shorten them, or set on_overlong=drop:", overlong))
    if not kept and overlong and not may_be_empty:
        raise DataError(listing("on_overlong=drop leaves nothing to train on:", overlong))
    return Fitting(kept, overlong)


def _too_long(length: int, limits: Limits) -> str:
    if length > limits.max_positions:
        return f"more than the model's context of {limits.max_positions}"
    if length > limits.room:
        return f"more than a micro-batch holds ({limits.room}): raise {limits.room_setting}"
    return ""

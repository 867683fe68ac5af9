"""Responses that were cut off at the largest length: which of their tokens count, and what long ones lose.

DAPO's soft punishment of a response of n tokens, with at most L tokens and a cache of C:

    0                              n <= L - C
    -penalty x (n - (L - C)) / C   above that; -penalty at n = L, where a response was cut off or ended just there

It is added to the reward before advantages are formed. Masks leave the tokens of cut-off responses out of a term and
change nothing else: such a response keeps its place in its group and among the batch's prompts, and its reward in the
group's mean and deviation. Of a mean over tokens its tokens are not counted.

Legend: _B responses of the batch, _N its loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_dgrpo.algorithms.advantages import EQUAL
from megatron_dgrpo.config.objective import Rewarded, RolloutObjective
from megatron_dgrpo.config.overlong import Mask, MaskSurrogate, Penalise
from megatron_dgrpo.packing.trajectory import Trajectory

SURROGATE = "surrogate"


def truncated(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Of each response, whether it was cut off."""
    return np.asarray([t.finish_reason == "length" for t in trajectories], bool)


def masked_terms(objective: RolloutObjective, terms: Sequence[str]) -> list[str]:
    """The terms that leave out what was cut off."""
    match objective.overlong:
        case Mask():
            return list(terms)
        case MaskSurrogate():
            return [term for term in terms if term == SURROGATE]
    return []


def penalties(objective: RolloutObjective, trajectories: Sequence[Trajectory], max_tokens: int) -> np.ndarray:
    """What each response's reward changes by: 0 or less."""
    lengths_B = np.asarray([len(t.response_tokens) for t in trajectories], np.float64)
    if not isinstance(objective, Rewarded) or not isinstance(objective.overlong, Penalise):
        return np.zeros_like(lengths_B)
    cache = objective.overlong.cache
    return -objective.overlong.penalty * np.clip((lengths_B - (max_tokens - cache)) / cache, 0.0, 1.0)


def length_by_reward(
    prompt_ids: Sequence[str], lengths_B: Sequence[int], rewards_B: Sequence[float]
) -> dict[str, float]:
    """Mean length of the responses with more, and with less, than their prompt's mean reward: which way length pays.
    Groups of equal rewards are in neither."""
    groups: dict[str, list[int]] = {}
    for i, prompt_id in enumerate(prompt_ids):
        groups.setdefault(prompt_id, []).append(i)
    found: dict[str, list[int]] = {"response/length_above": [], "response/length_below": []}
    for members in groups.values():
        of_group = np.asarray([rewards_B[i] for i in members])
        if np.ptp(of_group) <= EQUAL * np.abs(of_group).max():
            continue
        for i, reward in zip(members, of_group, strict=True):
            found["response/length_above" if reward > of_group.mean() else "response/length_below"].append(lengths_B[i])
    return {name: float(np.mean(lengths)) for name, lengths in found.items() if lengths}

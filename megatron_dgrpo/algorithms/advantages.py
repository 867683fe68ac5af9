"""Advantages of a group: what each response of a prompt earned, compared with its siblings.

    std            (R_i - mean_j R_j) / (std_j R_j + epsilon)      dGRPO and GRPO
    mean           R_i - mean_j R_j                                SRPO, SDPO
    leave_one_out  R_i - mean_{j != i} R_j                         RLOO

The standard deviation divides by G (population) or by G - 1 (sample); both are in use elsewhere under the same name,
so the choice is a setting. A group whose rewards are equal has advantage exactly 0: its mean is subject to rounding
(three times 0.1 has the mean 0.10000000000000002), and without a large epsilon the quotient of two rounding errors is
of order one. Such a group is not dropped: its other terms, the KL to the teacher above all, still train it.

Legend: _N samples of the batch. Groups may differ in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_dgrpo.errors import ObjectiveError, listing

Kind = Literal["std", "mean", "leave_one_out"]
Std = Literal["population", "sample"]

EQUAL = 1e-12
"""Rewards are the same when they differ by no more than this share of the largest of them: weighted sums of the same
parts, added in another order, differ by a few 1e-16."""


@dataclass(frozen=True)
class GroupAdvantages:
    values_N: np.ndarray  # float64
    num_groups: int
    num_equal_groups: int  # groups whose rewards are all the same: advantage 0


def group_advantages(
    rewards_N: Sequence[float] | np.ndarray,
    prompt_N: Sequence[int] | np.ndarray,
    *,
    kind: Kind = "std",
    std: Std = "population",
    epsilon: float = 1e-6,
    names: Sequence[str] | None = None,
) -> GroupAdvantages:
    """Advantages of samples whose prompt is `prompt_N` (any integers; equal ones form a group), in their order.

    `names` are what an error calls the samples; without them it gives their numbers.
    """
    rewards_N = np.asarray(rewards_N, dtype=np.float64)
    prompt_N = np.asarray(prompt_N, dtype=np.int64)
    if rewards_N.ndim != 1 or rewards_N.shape != prompt_N.shape:
        raise ObjectiveError(
            f"rewards have shape {rewards_N.shape} and prompts {prompt_N.shape}: one reward and one prompt per sample"
        )
    if bad := np.flatnonzero(~np.isfinite(rewards_N)).tolist():
        name = (lambda i: names[i]) if names is not None else (lambda i: f"sample {i} (prompt {prompt_N[i]})")
        raise ObjectiveError(
            listing(
                "rewards must be finite numbers; fix the reward function, or have it raise where it cannot judge:",
                (f"{name(i)}: {rewards_N[i]}" for i in bad),
            )
        )
    values_N = np.zeros_like(rewards_N)
    prompts, group_N = np.unique(prompt_N, return_inverse=True)
    num_equal = 0
    for members in np.split(np.argsort(group_N, kind="stable"), np.cumsum(np.bincount(group_N))[:-1]):
        rewards_G = rewards_N[members]
        if members.size == 0 or np.ptp(rewards_G) <= EQUAL * np.abs(rewards_G).max():
            num_equal += members.size > 0
            continue
        values_N[members] = _advantages(rewards_G, kind, std, epsilon)
    return GroupAdvantages(values_N=values_N, num_groups=len(prompts), num_equal_groups=num_equal)


def _advantages(rewards_G: np.ndarray, kind: Kind, std: Std, epsilon: float) -> np.ndarray:
    """Of one group whose rewards are not all the same, hence of two or more."""
    deviation_G = rewards_G - rewards_G.mean()
    if kind == "std":
        return deviation_G / (rewards_G.std(ddof=0 if std == "population" else 1) + epsilon)
    if kind == "mean":
        return deviation_G
    if kind == "leave_one_out":
        return deviation_G * (len(rewards_G) / (len(rewards_G) - 1))
    raise ObjectiveError(f"no advantage is called {kind!r}: use std, mean or leave_one_out")

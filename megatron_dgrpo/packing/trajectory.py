"""What a rollout leaves behind: frozen, made of token ids, never decoded and tokenised again.

A trajectory is a prompt followed by segments. A segment with `trained=True` was sampled by the policy and every one of
its tokens (EOS and stop ids too) is a loss row; a segment with `trained=False` was put there by somebody else (a tool's
output) and is context only. Three log-probs are kept apart and never mixed:

- behaviour: what the rollout engine reported when it sampled the token, under the sampling temperature;
- old: the trainer's own, with the weights that the batch of rollouts began with (None with one update per batch);
- current: the trainer's with the live weights, which only exists inside an update and so has no field here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dgrpo.errors import DataError, listing


@dataclass(frozen=True)
class Segment:
    tokens: np.ndarray  # int32 [n]
    trained: bool
    behaviour_logprobs: np.ndarray | None = None  # float32 [n], only where trained
    old_logprobs: np.ndarray | None = None  # float32 [n], only where trained
    weight_versions: np.ndarray | None = None  # int32 [n], the version that sampled each token


@dataclass(frozen=True)
class Trajectory:
    prompt_id: str  # the sample of the dataset; the trajectories of one prompt form a group
    sample: int  # 0 .. group_size - 1
    prompt_tokens: np.ndarray  # int32 [p], p >= 1
    segments: tuple[Segment, ...]
    finish_reason: str  # "stop" or "length"
    rewards: Mapping[str, float] = field(default_factory=dict)  # by the reward's name, before weighting
    teacher: str | None = None  # the name of the one that scores it; None: there is no choice

    @property
    def response_tokens(self) -> np.ndarray:
        """Every token after the prompt, trained or not."""
        return np.concatenate([s.tokens for s in self.segments]) if self.segments else np.zeros(0, np.int32)

    @property
    def num_loss_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.segments if s.trained)


def teacher_numbers(trajectories: Sequence[Trajectory], names: Sequence[str]) -> np.ndarray:
    """Which of the teachers scores each trajectory. One teacher scores all that name none."""
    number = {name: i for i, name in enumerate(names)} | ({None: 0} if len(names) == 1 else {})
    if lost := dict.fromkeys(f"{t.prompt_id}: {t.teacher!r}" for t in trajectories if t.teacher not in number):
        raise DataError(listing(f"These prompts name no teacher; there is {', '.join(map(repr, names))}:", list(lost)))
    return np.asarray([number[t.teacher] for t in trajectories], np.int64)


def by_prompts(trajectories: Sequence[Trajectory], num_shares: int) -> list[list[Trajectory]]:
    """Shares of whole groups, in equal numbers (one group less in some where groups are missing), none empty."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.prompt_id, []).append(trajectory)
    shares = np.array_split(np.arange(len(groups)), min(len(groups), num_shares))
    members = list(groups.values())
    return [[trajectory for group in share for trajectory in members[group]] for share in shares]

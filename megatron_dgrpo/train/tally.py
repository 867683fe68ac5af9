"""What is known of a step's batch as its parts come in: what of it is trained on, its normalisation, its figures.

Weights carry the whole normalisation, 1 over the number of the batch's prompts (or responses, or tokens, as the
aggregation says). A part that comes before the others cannot know it, as some of them may be too long and dropped, or
simply because nobody knows how long they will be. So a part is weighted as if the batch had the number that is to be
expected, and the sum of all parts is multiplied by expected / found, in the gradient and in the metrics that grow with
the weights: exactly what the whole batch gives at once. The factor is 1, and nothing is multiplied, where means are
over prompts or responses and nothing was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dgrpo.algorithms.aggregation import denominator
from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
from megatron_dgrpo.algorithms.overlong import length_by_reward, penalties
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.config.overlong import Penalise
from megatron_dgrpo.config.schema import OnPolicy, Periodic
from megatron_dgrpo.errors import DataError, ObjectiveError
from megatron_dgrpo.packing.trajectory import Trajectory, by_prompts
from megatron_dgrpo.rollout.journal import Sample, samples_of
from megatron_dgrpo.train.collect import reward_means, totals
from megatron_dgrpo.train.run import Run


def check_schedule(stage: OnPolicy) -> None:
    """Terms that look at the whole batch first cannot be trained on a part of it."""
    loss, _ = dgrpo_loss(stage.objective)
    if isinstance(stage.schedule, Periodic) and loss.needs != "token":
        raise ObjectiveError(
            f"a term of this objective must see every {loss.needs} of the batch before its first gradient, and the "
            "periodic schedule trains on parts of it as they end: set schedule=synchronous"
        )


class Tally:
    """Of one step."""

    def __init__(self, stage: OnPolicy, facts: Mapping[str, float], teachers: Sequence[str] = ()) -> None:
        self._stage, self._teachers = stage, teachers
        self._in_parts = isinstance(stage.schedule, Periodic)
        self._expected = _expected(stage)
        self._found = 0.0
        self._scores: list[Mapping[str, float]] = []
        self._rewards: list[float] = []
        self._prompts: list[str] = []
        self._penalties: list[float] = []
        self._lengths: list[int] = []
        self._truncated: list[bool] = []
        self.samples: list[tuple[Sample, ...]] = []
        """What each update trains on, of one pass over the batch."""
        self.facts = dict(facts)
        """For the step's record."""

    def samples_of(self, update: int) -> tuple[Sample, ...]:
        """What an update (from 1) trains on; each pass over the batch has the same shares."""
        return self.samples[(update - 1) % len(self.samples)]

    def shares(self, run: Run, chunk: Sequence[Trajectory]) -> list[list[Trajectory]]:
        """What of a chunk fits, and is trained on together; every rank of the world knows it."""
        self._observe(chunk)
        found = shares(run, self._stage, chunk, self.facts)
        taken = [tuple(samples_of(members)) for members in found]
        if self._in_parts:
            taken = [tuple(sample for one in (*self.samples, *taken) for sample in one)]
        self.samples = taken
        return found

    def streams(self, trajectories: Sequence[Trajectory]) -> Streams:
        """Those of a share: of an update of its own, or weighted as a part of the batch that is expected."""
        stage = self._stage
        rewards_B = totals(trajectories, stage.rewards) + penalties(
            stage.objective, trajectories, stage.sampling.max_tokens
        )
        batch = dgrpo_streams(trajectories, rewards_B, stage.objective, self._teachers)
        for name, value in batch.facts.items():
            self.facts[name] = self.facts.get(name, 0.0) + value
        if not self._in_parts:
            return batch.streams
        here = denominator(
            stage.objective.aggregation,
            np.unique([t.prompt_id for t in trajectories], return_inverse=True)[1],
            [t.num_loss_tokens for t in trajectories],
        )
        self._found += here
        return batch.streams.weighted(here / self._expected)

    @property
    def scale(self) -> float:
        """What multiplies the sum of all parts."""
        if not self._in_parts:
            return 1.0
        if not self._found:
            raise DataError("on_overlong=drop leaves nothing of the whole step to train on: raise micro_batch_tokens")
        return self._expected / self._found

    def _observe(self, trajectories: Sequence[Trajectory]) -> None:
        if not (trajectories or self._rewards):  # groups that a reward failed on
            return
        self._scores += [t.rewards for t in trajectories]
        self._prompts += [t.prompt_id for t in trajectories]
        self._rewards += totals(trajectories, self._stage.rewards).tolist()
        self._lengths += [t.num_loss_tokens for t in trajectories]
        self._truncated += [t.finish_reason == "length" for t in trajectories]
        prompt_tokens = sum(len(t.prompt_tokens) for t in trajectories)
        if self._stage.rewards:
            self.facts |= {"reward/mean": float(np.mean(self._rewards)), "reward/std": float(np.std(self._rewards))}
            self.facts |= length_by_reward(self._prompts, self._lengths, self._rewards)
        objective = self._stage.objective
        if isinstance(objective.overlong, Penalise):
            lost_B = penalties(objective, trajectories, self._stage.sampling.max_tokens)
            self._penalties += lost_B.tolist()
            self.facts["reward/overlong"] = float(np.mean(self._penalties))
        self.facts |= {
            **reward_means(self._scores, "reward"),
            "response/length": float(np.mean(self._lengths)),
            "response/truncated": float(np.mean(self._truncated)),
            "tokens": self.facts.get("tokens", 0.0) + sum(t.num_loss_tokens for t in trajectories) + prompt_tokens,
        }


def shares(run: Run, stage: OnPolicy, chunk: Sequence[Trajectory], facts: dict[str, float]) -> list[list[Trajectory]]:
    """What of a chunk fits, in one share for each update; in one or none where the chunk is a part of an update's."""
    fitting = run.fitting(chunk, stage, facts, whole=not isinstance(stage.schedule, Periodic))
    return by_prompts(fitting, stage.updates_per_batch) if fitting else []


def _expected(stage: OnPolicy) -> float:
    """The denominator of the batch, before it is there."""
    prompts, responses = stage.prompts_per_step, stage.prompts_per_step * stage.group_size
    match stage.objective.aggregation:
        case "sequence_group_prompt_mean":
            return float(prompts)
        case "sequence_mean":
            return float(responses)
        case _:
            return float(responses * stage.sampling.max_tokens)

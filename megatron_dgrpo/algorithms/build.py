"""Batches to token streams, and configs to losses: the one place where an algorithm is put together.

Legend: _N loss tokens of the batch, _B its trajectories. Streams list the loss tokens trajectory by trajectory, segment
by segment, as they were sampled.

`position_N` is the position of the *target* itself in its document, prompt included: the hidden state that predicts it
stands at `position - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_dgrpo.algorithms.advantages import GroupAdvantages, group_advantages
from megatron_dgrpo.algorithms.aggregation import Aggregation, token_weights
from megatron_dgrpo.algorithms.corrections import corrected
from megatron_dgrpo.algorithms.estimators import teacher_divergence
from megatron_dgrpo.algorithms.factors import Factors
from megatron_dgrpo.algorithms.losses import Loss
from megatron_dgrpo.algorithms.overlong import masked_terms, truncated
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import ClippedSurrogate, Term, entropy, nll
from megatron_dgrpo.config.objective import (
    JSD,
    Advantages,
    AnyObjective,
    KDObjective,
    Rewarded,
    RolloutObjective,
    Taught,
    TopK,
)
from megatron_dgrpo.errors import ObjectiveError, listing
from megatron_dgrpo.packing.trajectory import Segment, Trajectory, teacher_numbers

_LISTED = 8
"""Samples that an error names; it counts the others."""
_NOT_FINITE = (
    "\nThe engine's logits are not finite: check the weights in the student's folder, or lower the learning rate if"
    " training has begun"
)


@dataclass(frozen=True)
class Batch:
    """Streams, and what their making is worth telling."""

    streams: Streams
    facts: dict[str, float]


def dgrpo_loss(objective: AnyObjective) -> tuple[Loss, dict[str, float]]:
    """An objective's loss and its factors at a stage's first step (`Factors` has those of the others): the one place
    where algorithms differ. dGRPO has a surrogate and a divergence, GRPO the first of them, OPD and KD the second."""
    terms: list[Term] = []
    if isinstance(objective, Rewarded):
        clips = {"clip_low": objective.clip_low, "clip_high": objective.clip_high, "dual_clip": objective.dual_clip}
        surrogate = ClippedSurrogate(log_ratio_clamp=objective.log_ratio_clamp, **clips)  # type: ignore[arg-type]
        terms.append(corrected(surrogate, objective.correction))
    if isinstance(objective, Taught | KDObjective) and objective.uses_teacher:
        terms.append(_divergence(objective))
    if isinstance(objective, KDObjective):
        terms += [nll()] if objective.uses_nll else []
    elif objective.uses_entropy:
        terms.append(entropy())
    loss = Loss(tuple(terms))
    return loss, Factors(objective, loss).at(0)


def _divergence(objective: Taught | KDObjective) -> Term:
    estimator = objective.estimator
    return teacher_divergence(
        objective.divergence.kind,
        objective.estimator_name,  # type: ignore[arg-type] # checked by what is called
        baseline=getattr(estimator, "baseline", False),
        teacher_floor=getattr(estimator, "teacher_floor", None),
        log_ratio_clamp=objective.log_ratio_clamp if isinstance(objective, Taught) else 20.0,  # of samples alone
    )


def head_options(objective: AnyObjective) -> dict[str, float | int]:
    """What the heads must know to form the objective's statistics, beside their names."""
    options: dict[str, float | int] = {}
    if isinstance(objective, Taught | KDObjective):
        if isinstance(objective.divergence, JSD):
            options["jsd_alpha"] = objective.divergence.alpha
        if isinstance(objective.estimator, TopK):
            options["topk"] = objective.estimator.k
    return options


def sft_loss() -> tuple[Loss, dict[str, float]]:
    return Loss((nll(),)), {"nll": 1.0}


def dgrpo_streams(
    trajectories: Sequence[Trajectory],
    rewards_B: Sequence[float] | np.ndarray,
    objective: RolloutObjective,
    teachers: Sequence[str] = (),
) -> Batch:
    """The streams of one update: advantages over each prompt's group where rewards have a say, weights over all of
    these trajectories.

    Several `teachers` share out the tokens as their trajectories say.
    """
    _check_groups(trajectories)
    loss, _ = dgrpo_loss(objective)
    terms = [term.name for term in loss.terms]
    masked = masked_terms(objective, terms)
    bare = _streams(trajectories, objective.aggregation, terms, masked)
    facts = {"groups": float(len({t.prompt_id for t in trajectories})), "loss_tokens": float(bare.num_tokens)}
    advantages_N = None
    if isinstance(objective, Rewarded):
        advantages = _advantages(trajectories, rewards_B, objective.advantages)
        advantages_N = torch.from_numpy(advantages.values_N)[bare.sample_N]
        facts["equal_groups"] = float(advantages.num_equal_groups)
    streams = Streams(
        targets_N=bare.targets_N,
        sample_N=bare.sample_N,
        position_N=bare.position_N,
        weights=bare.weights,
        advantages_N=advantages_N,
        behaviour_logprobs_N=_logprobs(trajectories, "behaviour_logprobs"),
        old_logprobs_N=_logprobs(trajectories, "old_logprobs"),
        teacher_N=torch.from_numpy(teacher_numbers(trajectories, teachers))[bare.sample_N] if teachers[1:] else None,
        num_samples=len(trajectories),
    )
    return Batch(streams, facts)


def _advantages(
    trajectories: Sequence[Trajectory], rewards_B: Sequence[float] | np.ndarray, settings: Advantages
) -> GroupAdvantages:
    prompt_B, names = _prompts(trajectories)
    return group_advantages(
        rewards_B, prompt_B, kind=settings.kind, std=settings.std, epsilon=settings.epsilon, names=names
    )


def static_streams(
    examples: Sequence[Trajectory],
    terms: Sequence[str],
    aggregation: Aggregation = "token_mean",
    teachers: Sequence[str] = (),
) -> Batch:
    """Examples out of the data: trajectories whose trained segments are the answers, without log-probs or rewards."""
    streams = _streams(examples, aggregation, terms)
    if teachers[1:]:
        numbers = torch.from_numpy(teacher_numbers(examples, teachers))[streams.sample_N]
        streams = replace(streams, teacher_N=numbers)
    return Batch(streams, {"loss_tokens": float(streams.num_tokens)})


def sft_streams(examples: Sequence[Trajectory], aggregation: Aggregation = "token_mean") -> Batch:
    return static_streams(examples, ["nll"], aggregation)


def _streams(
    trajectories: Sequence[Trajectory], aggregation: Aggregation, terms: Sequence[str], masked: Sequence[str] = ()
) -> Streams:
    """The `masked` terms have no weight on responses that were cut off."""
    prompt_B, names = _prompts(trajectories)
    targets, positions, samples = [], [], []
    for index, trajectory in enumerate(trajectories):
        position = len(trajectory.prompt_tokens)
        for segment in trajectory.segments:
            end = position + len(segment.tokens)
            if segment.trained:
                targets.append(np.asarray(segment.tokens, dtype=np.int64))
                positions.append(np.arange(position, end, dtype=np.int64))
                samples.append(np.full(len(segment.tokens), index, dtype=np.int64))
            position = end
    sample_N = _concatenate(samples)
    whole_N = ~truncated(trajectories)[sample_N]
    weights_N, of_whole_N = (
        torch.from_numpy(token_weights(aggregation, sample_N, prompt_B, mask_N=mask_N, names=names))
        for mask_N in (None, whole_N)
    )
    return Streams(
        targets_N=torch.from_numpy(_concatenate(targets)),
        sample_N=torch.from_numpy(sample_N),
        position_N=torch.from_numpy(_concatenate(positions)),
        weights={term: of_whole_N if term in masked else weights_N for term in terms},
        num_samples=len(trajectories),
    )


def _prompts(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, list[str]]:
    """Each trajectory's prompt as an integer, and what errors call the trajectory."""
    number: dict[str, int] = {}
    prompt_B = [number.setdefault(t.prompt_id, len(number)) for t in trajectories]
    return np.asarray(prompt_B, dtype=np.int64), [f"prompt {t.prompt_id!r}, sample {t.sample}" for t in trajectories]


def _check_groups(trajectories: Sequence[Trajectory]) -> None:
    seen: set[tuple[str, int]] = set()
    twice = []
    for t in trajectories:
        key = (t.prompt_id, t.sample)
        if key in seen:
            twice.append(f"prompt {t.prompt_id!r}, sample {t.sample}")
        seen.add(key)
    if twice:
        raise ObjectiveError(
            listing("trajectories appear twice; prompts need unique ids, and their samples numbers:", twice)
        )


def _logprobs(trajectories: Sequence[Trajectory], field: str) -> torch.Tensor | None:
    """One log-prob per loss token, or None where no trained segment has any."""
    trained: list[tuple[Trajectory, Segment]] = [(t, s) for t in trajectories for s in t.segments if s.trained]
    parts = [getattr(s, field) for _, s in trained]
    if all(part is None for part in parts):
        return None
    problems, nonfinite = [], False
    for (t, s), part in zip(trained, parts, strict=True):
        where = f"prompt {t.prompt_id!r}, sample {t.sample}"
        if part is None:
            problems.append(f"{where}: none")
        elif len(part) != len(s.tokens):
            problems.append(f"{where}: {len(part)} for {len(s.tokens)} tokens")
        elif not np.isfinite(part).all():
            nonfinite = True
            problems.append(f"{where}: not finite at {np.flatnonzero(~np.isfinite(part)).tolist()[:8]}")
    if problems:
        title = f"every sampled token of a batch needs a finite one of its {field.replace('_', ' ')}, or none has one:"
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        remedy = _NOT_FINITE if nonfinite and field == "behaviour_logprobs" else ""
        raise ObjectiveError(listing(title, problems[:_LISTED] + more) + remedy)
    return torch.from_numpy(_concatenate([np.asarray(part, dtype=np.float64) for part in parts], np.float64))


def _concatenate(parts: Sequence[np.ndarray], dtype: type = np.int64) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)

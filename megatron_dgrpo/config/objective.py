"""The objectives of the stages: surrogate, divergence to the teacher, entropy, likelihood, their coefficients.

Of rollouts there is one objective, dGRPO's, with two parts: `Rewarded` and `Taught`. GRPO's has the first alone, OPD's
the second; what an algorithm lacks has no key in its section.

A part that comes in kinds is written as a mapping with its `kind`, or as the kind's name alone where the kind's
defaults will do (`estimator: exact`). A coefficient is a schedule over the stage's steps, or a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_dgrpo.config.coefficients import (
    Adaptive,
    AdaptiveSchedule,
    Constant,
    Schedule,
    always_zero,
)
from megatron_dgrpo.config.divergences import never, refusal
from megatron_dgrpo.config.frozen import Frozen
from megatron_dgrpo.config.overlong import Keep, Mask, MaskSurrogate, Overlong, TaughtOverlong

# ---- the divergence to the teacher, and what is known of it at each token ----


class ReverseKL(Frozen):
    """KL(student || teacher)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class ForwardKL(Frozen):
    """KL(teacher || student)."""

    kind: Literal["forward_kl"] = "forward_kl"


class JSD(Frozen):
    """(1 - alpha) KL(student || M) + alpha KL(teacher || M) with M = (1 - alpha) student + alpha teacher."""

    kind: Literal["jsd"] = "jsd"
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's share of the mixture."""


class Exact(Frozen):
    """A sum over the whole vocabulary."""

    kind: Literal["exact"] = "exact"


class TopK(Frozen):
    """A sum over the likeliest ids of the student or of the teacher."""

    kind: Literal["topk_student", "topk_teacher"]
    k: PositiveInt = 128
    """The number of ids."""
    rest: Literal["tail", "stopgrad"] = "tail"
    """All other ids: one bucket of the sum (tail), or left out with the log-ratio held constant (stopgrad)."""


TeacherFloor = Annotated[float, Field(lt=0)] | None


class Sampled(Frozen):
    """The log-ratio of the sampled token as an advantage (k1): the reverse KL's gradient in expectation."""

    kind: Literal["sampled"] = "sampled"
    baseline: bool = False
    """Subtract the token's exact KL: the same expectation with less variance."""
    teacher_floor: TeacherFloor = None
    """The teacher's log-prob of a token counts as at least this (a negative number); what it touches is counted."""


class K2(Frozen):
    """Half the square of the sampled token's log-ratio: the reverse KL's gradient in expectation."""

    kind: Literal["k2"] = "k2"
    teacher_floor: TeacherFloor = None
    """The teacher's log-prob of a token counts as at least this (a negative number); what it touches is counted."""


class K3(Frozen):
    """exp(-x) - 1 + x of the sampled token's log-ratio x: the *forward* KL's gradient in expectation."""

    kind: Literal["k3"] = "k3"
    teacher_floor: TeacherFloor = None
    """The teacher's log-prob of a token counts as at least this (a negative number); what it touches is counted."""


def _kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _estimator(value: Any) -> Any:
    value = _kind(value)
    if isinstance(value, dict) and (reason := never(str(value.get("kind")))):
        raise ValueError(reason)
    return value


Divergence = Annotated[ReverseKL | ForwardKL | JSD, Field(discriminator="kind"), BeforeValidator(_kind)]
Estimator = Annotated[Exact | TopK | Sampled | K2 | K3, Field(discriminator="kind"), BeforeValidator(_estimator)]
StaticEstimator = Annotated[Exact | TopK, Field(discriminator="kind"), BeforeValidator(_estimator)]


# ---- corrections for the engine's arithmetic; the ratio is exp(trainer's - engine's log-prob at the same weights) ----


class Truncated(Frozen):
    """The surrogate's tokens weigh as much as the ratio, and no more than a cap (truncated importance sampling)."""

    kind: Literal["truncated"] = "truncated"
    level: Literal["token", "sequence"] = "token"
    """Each token's own ratio, or the product over its response."""
    cap: Annotated[float, Field(ge=1)] = 2.0
    """The largest weight."""


class Masked(Frozen):
    """The surrogate's tokens weigh as much as the ratio, and nothing where it is out of bounds (IcePop)."""

    kind: Literal["masked"] = "masked"
    low: PositiveFloat = 0.5
    """The smallest ratio that counts."""
    high: PositiveFloat = 5.0
    """The largest ratio that counts."""


class SequenceMask(Frozen):
    """The surrogate leaves responses out whose ratio is out of bounds; the others weigh what they weighed."""

    kind: Literal["sequence_mask"] = "sequence_mask"
    ratio: Literal["geometric_mean", "product"] = "geometric_mean"
    """Of all tokens of a response."""
    low: PositiveFloat
    """The smallest ratio that counts; for a geometric mean 0.99 is usual, for a product 0.5."""
    high: PositiveFloat
    """The largest ratio that counts; for a geometric mean 1.01 is usual, for a product 2."""


Correction = Annotated[Truncated | Masked | SequenceMask, Field(discriminator="kind"), BeforeValidator(_kind)]


# ---- the whole ----


class Advantages(Frozen):
    """How a group's rewards become advantages. A group of equal rewards has advantage 0 and keeps its divergence."""

    kind: Literal["std", "mean", "leave_one_out"] = "std"
    """std: (reward - mean of the group) / (its standard deviation + epsilon). mean: reward - mean of the group.
    leave_one_out: reward - mean of the group's other rewards."""
    std: Literal["population", "sample"] = "population"
    """Of kind std: divide the squared deviations by G (population) or by G - 1 (sample)."""
    epsilon: NonNegativeFloat = 1e-6
    """Of kind std: added to the standard deviation."""


class OnPolicyObjective(Frozen):
    """What the objectives of rollouts have in common: a sum of terms, per sampled token."""

    entropy: Schedule = Constant(value=0.0)
    """Coefficient of the policy's entropy, which a value above 0 raises."""
    aggregation: Literal["sequence_group_prompt_mean", "sequence_mean", "token_mean"] = "sequence_group_prompt_mean"
    """A mean over each response's tokens, then over the group, then over the prompts; over each response's tokens, then
    over all responses; or over all tokens of the batch."""
    log_ratio_clamp: PositiveFloat = 20.0
    """Log-ratios are held within plus and minus this, against overflow; what it touches is counted and has no gradient
    in the surrogate."""

    @property
    def uses_teacher(self) -> bool:
        return False

    @property
    def masks(self) -> bool:
        """Whether responses that were cut off are left out of a term."""
        return isinstance(getattr(self, "overlong", None), Mask | MaskSurrogate)

    @property
    def uses_entropy(self) -> bool:
        return not always_zero(self.entropy)


class Rewarded(OnPolicyObjective):
    """With the clipped surrogate of advantages, which come from rewards."""

    clip_low: PositiveFloat = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """A token of negative advantage A costs no more than this many |A|, however large its ratio (none: no bound)."""
    advantages: Advantages = Advantages()
    correction: Correction | None = None
    """How the surrogate's tokens are weighed for what the trainer's log-probs differ from the engine's (none: not)."""
    overlong: Overlong = Keep()
    """What becomes of responses that were cut off at max_tokens: they count as others do (keep), the surrogate leaves
    them out (mask_surrogate), every term does (mask), or long ones lose reward (penalise)."""


class Taught(OnPolicyObjective):
    """With a divergence to the teacher."""

    beta: AdaptiveSchedule = Constant(value=1.0)
    """Coefficient of the divergence to the teacher."""
    divergence: Divergence = ReverseKL()
    """The divergence to the teacher."""
    estimator: Estimator = Exact()
    """How the divergence is formed at each token."""

    @property
    def uses_teacher(self) -> bool:
        return not always_zero(self.beta)

    @property
    def estimator_name(self) -> str:
        """As `divergences` calls it."""
        return _estimator_name(self.estimator)


class Objective(Rewarded, Taught):
    """dGRPO: the clipped surrogate minus beta times the divergence to the teacher plus an entropy bonus, per token."""

    beta: AdaptiveSchedule = Constant(value=0.5)
    """Coefficient of the divergence to the teacher; 0 is GRPO and needs no teacher."""


class GRPOObjective(Rewarded):
    """dGRPO without a teacher."""


class OPDObjective(Taught):
    """dGRPO without rewards: on-policy distillation."""

    overlong: TaughtOverlong = Keep()
    """What becomes of responses that were cut off at max_tokens: they count as others do (keep), or not at all
    (mask)."""


class KDObjective(Frozen):
    """Distillation on answers that the data have: beta times a divergence to the teacher plus nll times the negative
    log-likelihood, per token of the answer."""

    beta: Schedule = Constant(value=1.0)
    """Coefficient of the divergence to the teacher."""
    divergence: Divergence = ForwardKL()
    """The divergence to the teacher."""
    estimator: StaticEstimator = Exact()
    """How the divergence is formed at each token. The tokens are not the student's samples, so that none of the sampled
    estimators would be right."""
    nll: Schedule = Constant(value=0.0)
    """Coefficient of the negative log-likelihood of the answer."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """A mean over all tokens of the batch's answers, or over each answer's tokens, then over the answers."""

    @property
    def uses_teacher(self) -> bool:
        return not always_zero(self.beta)

    @property
    def uses_nll(self) -> bool:
        return not always_zero(self.nll)

    @property
    def estimator_name(self) -> str:
        """As `divergences` calls it."""
        return _estimator_name(self.estimator)


RolloutObjective = Objective | GRPOObjective | OPDObjective
AnyObjective = RolloutObjective | KDObjective


def _estimator_name(estimator: Exact | TopK | Sampled | K2 | K3) -> str:
    return f"{estimator.kind}_{estimator.rest}" if isinstance(estimator, TopK) else estimator.kind


def problems(objective: AnyObjective) -> Iterator[str]:
    """What is contradictory; each begins with the key, relative to the objective's section."""
    if isinstance(objective, Taught | KDObjective):
        yield from _teaching_problems(objective, alone=not isinstance(objective, Objective))
    if isinstance(objective, Rewarded):
        yield from _surrogate_problems(objective)


def _teaching_problems(objective: Taught | KDObjective, *, alone: bool) -> Iterator[str]:
    if reason := refusal(objective.divergence.kind, objective.estimator_name):
        yield f"estimator: {reason}"
    beta = objective.beta
    if alone and not objective.uses_teacher:
        yield "beta: 0, and this stage learns from the teacher; set it above 0"
    if isinstance(beta, Adaptive):
        if not beta.low <= beta.initial <= beta.high:
            yield f"beta.initial: {beta.initial:g} is not within low={beta.low:g} and high={beta.high:g}; widen them"
        if beta.rate * beta.max_error >= 1:
            yield (
                f"beta.rate: rate x max_error is {beta.rate * beta.max_error:g}, and a step below the target could "
                "take beta to 0; keep it below 1 (0.02 by default)"
            )


def _surrogate_problems(objective: Rewarded) -> Iterator[str]:
    advantages, default = objective.advantages, Advantages()
    if advantages.kind != "std" and (advantages.std, advantages.epsilon) != (default.std, default.epsilon):
        yield f"advantages: std and epsilon belong to kind std, not to {advantages.kind}; remove them"
    correction = objective.correction
    if isinstance(correction, Masked | SequenceMask) and not correction.low < 1 < correction.high:
        yield (
            f"correction: a ratio of 1 is outside of low={correction.low:g} and high={correction.high:g}, so that what "
            "agrees is left out; set low below 1 and high above"
        )

"""The objective's section of a dGRPO stage: surrogate, divergence to the teacher, entropy, their coefficients.

A part that comes in kinds is written as a mapping with its `kind`, or as the kind's name alone where the kind's
defaults will do (`estimator: exact`). A coefficient is a schedule over the stage's steps, or a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_dgrpo.config.divergences import never, refusal
from megatron_dgrpo.config.frozen import Frozen

# ---- coefficients: schedules over the steps of a stage ----


class Constant(Frozen):
    """The same number at every step; writing the number alone means this."""

    kind: Literal["constant"] = "constant"
    value: NonNegativeFloat


class Linear(Frozen):
    """Along a straight line, then constant."""

    kind: Literal["linear"] = "linear"
    start: NonNegativeFloat
    """At the stage's first step."""
    end: NonNegativeFloat
    """After `steps` more, and from there."""
    steps: PositiveInt
    """Steps of the stage from start to end."""


class Cosine(Frozen):
    """Along half a cosine, then constant."""

    kind: Literal["cosine"] = "cosine"
    start: NonNegativeFloat
    """At the stage's first step."""
    end: NonNegativeFloat
    """After `steps` more, and from there."""
    steps: PositiveInt
    """Steps of the stage from start to end."""


class Adaptive(Frozen):
    """Follows the divergence: multiplied after each step by 1 + rate x error, the error being divergence / target - 1
    within +-max_error. Above the target it grows."""

    kind: Literal["adaptive"] = "adaptive"
    initial: PositiveFloat
    """At the stage's first step."""
    target: PositiveFloat
    """The divergence to aim at: the step's mean over loss tokens of what the estimator reports."""
    rate: PositiveFloat = 0.1
    """How fast it follows."""
    max_error: PositiveFloat = 0.2
    """The relative error of one step counts no more than this."""
    low: PositiveFloat = 1e-4
    """It never falls below this."""
    high: PositiveFloat = 1e2
    """It never rises above this."""


def _constant(value: Any) -> Any:
    if isinstance(value, dict | Frozen):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{value!r} should be a number, 0 or more, or a mapping with a kind (a schedule)")
    return {"kind": "constant", "value": value}


Schedule = Annotated[Constant | Linear | Cosine, Field(discriminator="kind"), BeforeValidator(_constant)]
AdaptiveSchedule = Annotated[
    Constant | Linear | Cosine | Adaptive, Field(discriminator="kind"), BeforeValidator(_constant)
]


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


class Objective(Frozen):
    """dGRPO: the clipped surrogate minus beta times the divergence to the teacher plus an entropy bonus, per token."""

    clip_low: PositiveFloat = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """A token of negative advantage A costs no more than this many |A|, however large its ratio (none: no bound)."""
    log_ratio_clamp: PositiveFloat = 20.0
    """Log-ratios are held within plus and minus this, against overflow; what it touches is counted and has no gradient
    in the surrogate."""
    beta: AdaptiveSchedule = Constant(value=0.5)
    """Coefficient of the divergence to the teacher; 0 is GRPO and needs no teacher."""
    divergence: Divergence = ReverseKL()
    """The divergence to the teacher."""
    estimator: Estimator = Exact()
    """How the divergence is formed at each token."""
    entropy: Schedule = Constant(value=0.0)
    """Coefficient of the policy's entropy, which a value above 0 raises."""
    aggregation: Literal["sequence_group_prompt_mean", "sequence_mean", "token_mean"] = "sequence_group_prompt_mean"
    """A mean over each response's tokens, then over the group, then over the prompts; over each response's tokens, then
    over all responses; or over all tokens of the batch."""
    advantages: Advantages = Advantages()
    correction: Correction | None = None
    """How the surrogate's tokens are weighed for what the trainer's log-probs differ from the engine's (none: not)."""

    @property
    def uses_teacher(self) -> bool:
        return not _always_zero(self.beta)

    @property
    def uses_entropy(self) -> bool:
        return not _always_zero(self.entropy)

    @property
    def estimator_name(self) -> str:
        """As `divergences` calls it."""
        rest = f"_{self.estimator.rest}" if isinstance(self.estimator, TopK) else ""
        return f"{self.estimator.kind}{rest}"


def _always_zero(schedule: Constant | Linear | Cosine | Adaptive) -> bool:
    match schedule:
        case Constant(value=value):
            return value == 0
        case Linear(start=start, end=end) | Cosine(start=start, end=end):
            return start == end == 0
    return False


def problems(objective: Objective) -> Iterator[str]:
    """What is contradictory; each begins with the key, relative to the objective's section."""
    if reason := refusal(objective.divergence.kind, objective.estimator_name):
        yield f"estimator: {reason}"
    beta = objective.beta
    if isinstance(beta, Adaptive):
        if not beta.low <= beta.initial <= beta.high:
            yield f"beta.initial: {beta.initial:g} is not within low={beta.low:g} and high={beta.high:g}; widen them"
        if beta.rate * beta.max_error >= 1:
            yield (
                f"beta.rate: rate x max_error is {beta.rate * beta.max_error:g}, and a step below the target could "
                "take beta to 0; keep it below 1 (0.02 by default)"
            )
    advantages, default = objective.advantages, Advantages()
    if advantages.kind != "std" and (advantages.std, advantages.epsilon) != (default.std, default.epsilon):
        yield f"advantages: std and epsilon belong to kind std, not to {advantages.kind}; remove them"
    correction = objective.correction
    if isinstance(correction, Masked | SequenceMask) and not correction.low < 1 < correction.high:
        yield (
            f"correction: a ratio of 1 is outside of low={correction.low:g} and high={correction.high:g}, so that what "
            "agrees is left out; set low below 1 and high above"
        )

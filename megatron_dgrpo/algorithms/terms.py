"""Terms of the loss: pure functions of statistics and streams.

A term says what it costs per loss token. Its loss is `sum_T weight_T x value_T`, a quantity to *minimise*, over the
rows it is given; its coefficients are d loss / d statistic, row by row, written out by hand. The heads turn
coefficients into gradients of hidden states and head weights and know no term; a term knows no head. Coefficients are
what is trained on, so a value may contain stop-gradients (a detached ratio) that its coefficients honour.

Signs. The surrogate and entropy are to be maximised and enter with a minus; divergences and the negative
log-likelihood with a plus. A term's factor in the loss (beta of the teacher's KL) is not part of the term: `losses.py`
multiplies it in.

Three log-probs, never mixed. `statistics.logprob_T` is the live policy's. `streams.old_logprobs_N` is the trainer's at
the weights with which the batch began; None means that they are still the live ones, and then the ratio is exactly 1
and its gradient the log-prob's. `streams.behaviour_logprobs_N` is the rollout engine's; the surrogate never reads it.

What a term needs to know of other tokens is its `needs`: a `token` term sees its own row only, so it can be evaluated
on any chunk of rows while their logits exist. A `sequence` or `batch` term first sees every row of the batch once
(`summarise`), and gets the sum of those summaries over all micro-batches and ranks when it is evaluated.

Legend: _T rows of the micro-batch (or of a chunk of it); streams call the same rows _N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch

from megatron_dgrpo.algorithms.metrics import Metric, Sum, max_of, mean_of, sum_of
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.errors import ObjectiveError

Needs = Literal["token", "sequence", "batch"]


class Statistics(Protocol):
    """What the heads say of each row. Statistic `x` is the attribute `x_T`; terms name those that they read."""

    @property
    def logprob_T(self) -> torch.Tensor: ...  # log-prob of the target under the live policy


@dataclass(frozen=True)
class TermResult:
    loss: torch.Tensor  # float64 scalar, detached: sum of weight x value over the rows
    values_T: torch.Tensor  # the values, unweighted, detached
    coefficients: dict[str, torch.Tensor]  # statistic -> d loss / d statistic, [T]
    acting_T: torch.Tensor  # bool: rows with a weight
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # what there is to see of each row, [T]
    metrics: dict[str, Metric] = field(default_factory=dict)  # among them the means of `rows` over acting rows


@dataclass(frozen=True, kw_only=True)
class Term:
    """Base of the terms. `name` is also its weight stream's; `statistics` are those that it reads."""

    name: str
    needs: ClassVar[Needs] = "token"

    @property
    def statistics(self) -> tuple[str, ...]:
        raise NotImplementedError

    def summarise(self, statistics: Statistics, streams: Streams) -> dict[str, torch.Tensor]:
        """What other tokens must know of these rows: tensors of sizes fixed by the batch, which add up."""
        return {}

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        raise NotImplementedError

    def weights(self, statistics: Statistics, streams: Streams) -> torch.Tensor:
        """This term's weight stream, in the statistics' type."""
        if self.name not in streams.weights:
            raise ObjectiveError(
                f"no weights for term {self.name!r} in the streams (they have {sorted(streams.weights)}): give the"
                " term a weight stream where the streams are built"
            )
        return streams.weights[self.name].to(statistics.logprob_T)

    def result(
        self,
        weights_T: torch.Tensor,
        values_T: torch.Tensor,
        derivatives: Mapping[str, torch.Tensor],
        rows: Mapping[str, torch.Tensor],
        metrics: Mapping[str, Metric] | None = None,
    ) -> TermResult:
        """Weights times values, and weights times d value / d statistic. A weight of 0 silences whatever it meets."""
        acting_T = weights_T != 0
        weigh = lambda x_T: torch.where(acting_T, weights_T * x_T.detach(), torch.zeros_like(weights_T))  # noqa: E731
        loss = weigh(values_T).double().sum()
        own: dict[str, Metric] = {f"{self.name}/loss": Sum(loss), f"{self.name}/weight": sum_of(weights_T)}
        means = {f"{self.name}/{key}": mean_of(row_T, acting_T) for key, row_T in rows.items()}
        return TermResult(
            loss=loss,
            values_T=values_T.detach(),
            coefficients={name: weigh(d_T) for name, d_T in derivatives.items()},
            acting_T=acting_T,
            rows=dict(rows),
            metrics=own | means | dict(metrics or {}),
        )


def statistic(statistics: Statistics, name: str) -> torch.Tensor:
    """Statistic `name`, detached: terms differentiate by hand."""
    value_T = getattr(statistics, f"{name}_T", None)
    if value_T is None:
        raise ObjectiveError(f"the statistic {name!r} was not computed: ask the heads for it")
    return value_T.detach()


def log_shared_mass(statistics: Statistics) -> torch.Tensor:
    """log(1 - o), o the student's mass on ids that the teacher lacks; 0 where the statistics know of none."""
    outside_T = getattr(statistics, "outside_mass_T", None)
    if outside_T is None:
        return torch.zeros_like(statistics.logprob_T)
    return torch.log1p(-outside_T.detach())


@dataclass(frozen=True, kw_only=True)
class LogRatio:
    """log(pi / pi_old) per row, held within +-clamp, beyond which it is constant (and counted).

    The clamp is there for arithmetic alone: exp overflows float32 at 88. Where it touches, the ratio has no gradient.
    """

    log_T: torch.Tensor
    ratio_T: torch.Tensor
    clamped_T: torch.Tensor  # bool

    @classmethod
    def of(cls, logprob_T: torch.Tensor, reference_N: torch.Tensor | None, clamp: float) -> LogRatio:
        reference_T = logprob_T if reference_N is None else reference_N.to(logprob_T)
        raw_T = logprob_T - reference_T
        log_T = raw_T.clamp(-clamp, clamp)
        return cls(log_T=log_T, ratio_T=log_T.exp(), clamped_T=raw_T != log_T)

    def metrics(self, prefix: str, acting_T: torch.Tensor) -> dict[str, Metric]:
        return {
            f"{prefix}/ratio_max": max_of(self.ratio_T, acting_T),
            f"{prefix}/ratio_clamped": sum_of(self.clamped_T & acting_T),
        }


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate(Term):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / pi_old.

    With `dual_clip` = c > 1, a negative advantage costs no more than c |A|: max(that, c A) inside the minus.
    Beyond a bound that binds for its sign of A the value is constant and the coefficient 0.
    """

    name: str = "surrogate"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    log_ratio_clamp: float = 20.0

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("logprob",)

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        logprob_T = statistic(statistics, "logprob")
        ratio = LogRatio.of(logprob_T, streams.old_logprobs_N, self.log_ratio_clamp)
        return self.clip(ratio, advantages(streams, logprob_T), self.weights(statistics, streams))

    def clip(self, ratio: LogRatio, advantage_T: torch.Tensor, weights_T: torch.Tensor) -> TermResult:
        """The term of given ratios; d value / d log-ratio is what reaches the log-prob."""
        ratio_T = ratio.ratio_T
        up_T, down_T = advantage_T > 0, advantage_T < 0
        high_T = up_T & (ratio_T > 1 + self.clip_high)
        low_T = down_T & (ratio_T < 1 - self.clip_low)
        bound_T = torch.where(high_T, 1 + self.clip_high, torch.where(low_T, 1 - self.clip_low, ratio_T))
        dual_T = torch.zeros_like(high_T)
        if self.dual_clip is not None:
            dual_T = down_T & (ratio_T > self.dual_clip)
            bound_T = torch.where(dual_T, self.dual_clip, bound_T)
        value_T = -bound_T * advantage_T
        constant_T = high_T | low_T | dual_T | ratio.clamped_T
        slope_T = torch.where(constant_T, 0.0, -ratio_T * advantage_T)
        rows = {"ratio": ratio_T, "clipped_high": high_T, "clipped_low": low_T, "clipped_dual": dual_T}
        metrics = ratio.metrics(self.name, weights_T != 0)
        return self.result(weights_T, value_T, {"logprob": slope_T}, rows, metrics)


def advantages(streams: Streams, like_T: torch.Tensor) -> torch.Tensor:
    if streams.advantages_N is None:
        raise ObjectiveError("a surrogate needs advantages, and the streams have none: build them from rewards")
    return streams.advantages_N.to(like_T)


@dataclass(frozen=True, kw_only=True)
class StatisticTerm(Term):
    """A term that is one statistic of its own row, times a sign; the heads know the statistic's gradient."""

    of: str
    sign: float = 1.0

    @property
    def statistics(self) -> tuple[str, ...]:
        return (self.of,)

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        value_T = statistic(statistics, self.of)
        slopes = {self.of: torch.full_like(value_T, self.sign)}
        return self.result(self.weights(statistics, streams), self.sign * value_T, slopes, {self.of: value_T})


def reverse_kl(name: str = "teacher_kl") -> Term:
    """KL(student || teacher) of the row's whole distribution."""
    return StatisticTerm(name=name, of="kl")


def forward_kl(name: str = "teacher_forward_kl") -> Term:
    """KL(teacher || student): distillation on static data, too."""
    return StatisticTerm(name=name, of="forward_kl")


def jsd(name: str = "teacher_jsd") -> Term:
    """(1 - alpha) KL(student || M) + alpha KL(teacher || M), M = (1 - alpha) student + alpha teacher; the heads, which
    form M, hold alpha."""
    return StatisticTerm(name=name, of="jsd")


def entropy(name: str = "entropy") -> Term:
    """Minus the entropy: a positive factor keeps the policy spread out."""
    return StatisticTerm(name=name, of="entropy", sign=-1.0)


def nll(name: str = "nll") -> Term:
    """Negative log-likelihood of the target: SFT, and learning from the teacher's text."""
    return StatisticTerm(name=name, of="logprob", sign=-1.0)


def policy_metrics(statistics: Statistics, streams: Streams) -> dict[str, Metric]:
    """What is worth knowing of the policy whatever the loss, per loss token.

    `policy/moved_kl` estimates KL(old || current) by exp(x) - 1 - x, x = log(pi / pi_old), on the old policy's samples.
    """
    logprob_T = statistic(statistics, "logprob")
    metrics: dict[str, Metric] = {"policy/logprob": mean_of(logprob_T)}
    entropy_T = getattr(statistics, "entropy_T", None)
    if entropy_T is not None:
        metrics["policy/entropy"] = mean_of(entropy_T)
    if streams.old_logprobs_N is not None:
        log_T = logprob_T - streams.old_logprobs_N.to(logprob_T)
        metrics["policy/moved_kl"] = mean_of(log_T.clamp(max=20.0).exp() - 1 - log_T)
    return metrics

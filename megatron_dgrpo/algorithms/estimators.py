"""Estimators of the divergence to a teacher that need less than the exact statistic.

A sampled estimator knows the sampled token's two log-probs. With l = log pi - log q (q the teacher's, floored where a
floor is given), and the token drawn from mu, its importance ratio is r = pi / mu, *detached*:

    sampled        value r l          coefficient r (l - b)        reverse KL; k1 as an advantage, b a baseline
    k2             value r l^2 / 2    coefficient r l              reverse KL
    k3 (forward)   value r (d - 1 + l), d = exp(-l)    coefficient r (1 - d)    forward KL

Each coefficient's expectation over mu is the exact gradient, whatever mu is (METHODS: E2); with a live ratio those of
`sampled` and `k2` would be far off on stale tokens, and that of k3 would be the reverse KL's. The value of `sampled` is
an unbiased estimate of the KL, but it is not what its coefficient is the derivative of: that would be k1 as a loss,
which teaches nothing. Its baseline, where asked for, is the row's exact KL: sum_v p_v r (l_v - KL) grad log p_v has the
same expectation, because the score has mean zero, and a smaller variance. The value of k3 also estimates the reverse
KL: read a forward KL from its gradient, not from its figure.

mu is the policy that sampled the token: `old`, the trainer's own figure of it (absent: the live policy is still it,
r = 1), or `behaviour`, the engine's. The log-ratio is held within +-clamp, which truncates r; what that touches is
counted, as is what the teacher's floor touches. The floor is for outliers of q, which otherwise dominate a batch.

Where the student has ids that the teacher lacks, KL is between both distributions restricted to the shared ids. With o
the student's mass outside, l uses log pi - log(1 - o); a token inside counts 1 / (1 - o) times, one outside (the
teacher's log-prob is -inf) not at all, and is counted. k3, and `sampled` with its baseline, are exact so; without the
baseline and in k2 the gradient differs by KL times that of -log(1 - o), which is nothing where o is.

A top-k estimator is a statistic of the heads, with a gradient of its own: k ids of the student's or of the teacher's
largest, the rest of the mass as one `tail` bucket, or left out with the log-ratio `stopgrad`ed.

Legend: _T rows; streams call the same rows _N.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from megatron_dgrpo.algorithms.metrics import Metric, sum_of
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import (
    LogRatio,
    Statistics,
    StatisticTerm,
    Term,
    TermResult,
    forward_kl,
    jsd,
    log_shared_mass,
    reverse_kl,
    statistic,
)
from megatron_dgrpo.config.divergences import Divergence, Estimator, refusal
from megatron_dgrpo.errors import ObjectiveError

Sampler = Literal["old", "behaviour"]


@dataclass(frozen=True, kw_only=True)
class _Sampled(Term):
    """What the sampled estimators share: the log-ratio to the teacher, and the importance ratio."""

    name: str = "teacher_kl"
    sampler: Sampler = "old"
    teacher_floor: float | None = None
    log_ratio_clamp: float = 20.0
    reads: ClassVar[tuple[str, ...]] = ("logprob", "teacher_logprob")

    @property
    def statistics(self) -> tuple[str, ...]:
        return self.reads

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        weights_T = self.weights(statistics, streams)
        acting_T = weights_T != 0
        logprob_T = statistic(statistics, "logprob")
        teacher_T = statistic(statistics, "teacher_logprob")
        lacking_T = teacher_T == -torch.inf
        floored_T = torch.zeros_like(acting_T)
        if self.teacher_floor is not None:
            floored_T = (teacher_T < self.teacher_floor) & ~lacking_T
            teacher_T = teacher_T.clamp(min=self.teacher_floor)
        ratio = LogRatio.of(logprob_T, self._sampler_logprobs(streams), self.log_ratio_clamp)
        log_inside_T = log_shared_mass(statistics)
        log_T = (logprob_T - log_inside_T - teacher_T).masked_fill(lacking_T, 0.0)
        value_T, slope_T = self.estimate(log_T, statistics)
        share_T = (ratio.ratio_T * torch.exp(-log_inside_T)).masked_fill(lacking_T, 0.0)
        metrics: dict[str, Metric] = {
            f"{self.name}/teacher_floored": sum_of(floored_T & acting_T),
            f"{self.name}/teacher_lacks": sum_of(lacking_T & acting_T),
            **ratio.metrics(self.name, acting_T),
        }
        rows = {"k1": log_T, "ratio": ratio.ratio_T}
        return self.result(weights_T, share_T * value_T, {"logprob": share_T * slope_T}, rows, metrics)

    @abstractmethod
    def estimate(self, log_T: torch.Tensor, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and d value / d log-prob of l = log pi - log q, without the importance ratio."""

    def _sampler_logprobs(self, streams: Streams) -> torch.Tensor | None:
        if self.sampler == "old":
            return streams.old_logprobs_N
        if streams.behaviour_logprobs_N is None:
            raise ObjectiveError(
                f"term {self.name!r} weighs tokens by the rollout engine's log-probs, and the streams have none: keep"
                " behaviour_logprobs in the trajectories, or set sampler='old'"
            )
        return streams.behaviour_logprobs_N


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL(_Sampled):
    """k1 as an advantage; with `baseline`, less the row's exact KL."""

    baseline: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        return (*self.reads, "kl") if self.baseline else self.reads

    def estimate(self, log_T: torch.Tensor, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        return log_T, log_T - statistic(statistics, "kl") if self.baseline else log_T


@dataclass(frozen=True, kw_only=True)
class K2ReverseKL(_Sampled):
    """l^2 / 2."""

    def estimate(self, log_T: torch.Tensor, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        return log_T.square() / 2, log_T


@dataclass(frozen=True, kw_only=True)
class K3ForwardKL(_Sampled):
    """d - 1 + l, d = exp(-l): the *forward* KL's estimator and gradient. -l is held at the clamp, against overflow."""

    name: str = "teacher_forward_kl"

    def estimate(self, log_T: torch.Tensor, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        d_T = (-log_T).clamp(max=self.log_ratio_clamp).exp()
        return d_T - 1 + log_T, 1 - d_T


def topk_reverse_kl(support: Literal["student", "teacher"], rest: Literal["tail", "stopgrad"]) -> Term:
    """KL(student || teacher) over k ids, as the heads form it."""
    return StatisticTerm(name="teacher_kl", of=f"kl_topk_{support}_{rest}")


_STATISTICS: dict[tuple[str, str], Callable[[], Term]] = {
    ("reverse_kl", "exact"): reverse_kl,
    ("reverse_kl", "topk_student_tail"): lambda: topk_reverse_kl("student", "tail"),
    ("reverse_kl", "topk_student_stopgrad"): lambda: topk_reverse_kl("student", "stopgrad"),
    ("reverse_kl", "topk_teacher_tail"): lambda: topk_reverse_kl("teacher", "tail"),
    ("reverse_kl", "topk_teacher_stopgrad"): lambda: topk_reverse_kl("teacher", "stopgrad"),
    ("forward_kl", "exact"): forward_kl,
    ("jsd", "exact"): jsd,
}


def teacher_divergence(
    divergence: Divergence = "reverse_kl",
    estimator: Estimator = "exact",
    *,
    sampler: Sampler = "old",
    baseline: bool = False,
    teacher_floor: float | None = None,
    log_ratio_clamp: float = 20.0,
) -> Term:
    """The term of a divergence and its estimator; pairs with another gradient than their name says are refused."""
    if reason := refusal(divergence, estimator):
        raise ObjectiveError(reason)
    if baseline and estimator != "sampled":
        raise ObjectiveError(f"a baseline belongs to estimator 'sampled'; {estimator!r} has none: unset it")
    held = {"sampler": sampler, "teacher_floor": teacher_floor, "log_ratio_clamp": log_ratio_clamp}
    if estimator == "sampled":
        return SampledReverseKL(baseline=baseline, **held)  # type: ignore[arg-type]
    if estimator == "k2":
        return K2ReverseKL(**held)  # type: ignore[arg-type]
    if estimator == "k3":
        return K3ForwardKL(**held)  # type: ignore[arg-type]
    if teacher_floor is not None:
        raise ObjectiveError(
            f"a floor of the teacher's log-probs acts on the sampled token, and {estimator!r} is over many: use"
            " 'sampled' or 'k2', or unset it"
        )
    return _STATISTICS[divergence, estimator]()

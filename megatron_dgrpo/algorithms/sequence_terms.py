"""Terms that need to know more than their own token.

`SequenceSurrogate` (GSPO) compares whole responses: s_i = exp(mean over its loss tokens of log pi / pi_old), and every
token of the response carries min(s A, clip(s) A). Written with a stop-gradient, s_{i,t} = sg[s_i] pi_t / sg[pi_t], a
token's coefficient is -s A where the clip does not bind; with one weight for all tokens of a response that is exactly
the derivative of the response's loss, the mean's 1/|o_i| and the |o_i| tokens that share s_i cancelling.

`EntropyWeighted` (SRPO) multiplies another term's rows by exp(-beta H), H the entropy of the teacher's distribution,
divided by the mean of that over all rows on which the term acts in the batch. The weight is a constant: the teacher is
not trained.

Both take a first pass over the batch; what they sum there has a size that the batch fixes, so ranks and micro-batches
without rows add zeros of the same shape.

Legend: _T rows, _B responses of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from megatron_dgrpo.algorithms.metrics import Metric, mean_of, sum_of
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import (
    ClippedSurrogate,
    LogRatio,
    Needs,
    Statistics,
    Term,
    TermResult,
    advantages,
    statistic,
)
from megatron_dgrpo.errors import ObjectiveError


@dataclass(frozen=True, kw_only=True)
class SequenceSurrogate(ClippedSurrogate):
    """GSPO. Its weights must be the same for all loss tokens of a response, as per-sequence means are."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    log_ratio_clamp: float = 10.0
    needs: ClassVar[Needs] = "sequence"

    def summarise(self, statistics: Statistics, streams: Streams) -> dict[str, torch.Tensor]:
        """Per response: the sum of the log-ratios of the rows with a weight, and their number."""
        if streams.num_samples is None:
            raise ObjectiveError(f"term {self.name!r} sums over responses: the streams must say how many there are")
        logprob_T = statistic(statistics, "logprob")
        acting_T = self.weights(statistics, streams) != 0
        old_T = logprob_T if streams.old_logprobs_N is None else streams.old_logprobs_N.to(logprob_T)
        log_T = (logprob_T - old_T).where(acting_T, 0.0).double()
        zeros_B = log_T.new_zeros(streams.num_samples)
        return {
            "log_ratio_B": zeros_B.index_add(0, streams.sample_N, log_T),
            "length_B": zeros_B.index_add(0, streams.sample_N, acting_T.double()),
        }

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        assert summary is not None, "a sequence term is evaluated with the batch's summary"
        logprob_T = statistic(statistics, "logprob")
        mean_B = summary["log_ratio_B"] / summary["length_B"].clamp(min=1.0)
        ratio = LogRatio.of(mean_B[streams.sample_N].to(logprob_T), torch.zeros_like(logprob_T), self.log_ratio_clamp)
        return self.clip(ratio, advantages(streams, logprob_T), self.weights(statistics, streams))


@dataclass(frozen=True, kw_only=True)
class EntropyWeighted(Term):
    """`term`, its rows weighted by exp(-beta H(teacher)) with mean 1 over the batch. It bears the term's name."""

    name: str = ""
    term: Term
    beta: float = 1.0
    needs: ClassVar[Needs] = "batch"

    def __post_init__(self) -> None:
        if self.name not in ("", self.term.name):
            raise ObjectiveError(f"an entropy-weighted {self.term.name!r} keeps that name, not {self.name!r}")
        if self.term.needs != "token":
            raise ObjectiveError(f"only a term of single tokens can be weighted; {self.term.name!r} needs more")
        object.__setattr__(self, "name", self.term.name)

    @property
    def statistics(self) -> tuple[str, ...]:
        return (*self.term.statistics, "teacher_entropy")

    def summarise(self, statistics: Statistics, streams: Streams) -> dict[str, torch.Tensor]:
        acting_T = self.weights(statistics, streams) != 0
        raw_T = self._raw(statistics).double()
        return {"total": raw_T.where(acting_T, 0.0).sum(), "count": acting_T.double().sum()}

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        assert summary is not None, "a batch term is evaluated with the batch's summary"
        mean = summary["total"] / summary["count"].clamp(min=1.0)
        factor_T = (self._raw(statistics).double() / mean.where(mean > 0, 1.0)).to(statistics.logprob_T)
        weights_T = self.weights(statistics, streams)
        result = self.term(statistics, replace(streams, weights={self.name: weights_T * factor_T}))
        silent = (summary["total"] <= 0) & (summary["count"] > 0)
        metrics: dict[str, Metric] = {
            f"{self.name}/entropy_weight": mean_of(factor_T, weights_T != 0),
            f"{self.name}/silenced": sum_of(silent),  # the weights of all rows are 0 in this arithmetic
        }
        return replace(result, metrics=result.metrics | metrics)

    def _raw(self, statistics: Statistics) -> torch.Tensor:
        return torch.exp(-self.beta * statistic(statistics, "teacher_entropy"))

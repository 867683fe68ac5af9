"""Corrections of the surrogate for what the rollout engine's arithmetic made of the policy.

The surrogate's formula takes a token for a sample of the trainer's old policy. It is one of the engine's, mu, whose
log-prob of it differs by d = log pi_old - log mu: by rounding, by another attention kernel, by FP8, or because mu was
truncated to its likeliest ids. A correction weighs the surrogate's tokens by a function of d:

    truncated, level token         w_t = min(exp(d_t), cap)                           (TIS)
    truncated, level sequence      w_t = min(exp(sum over the response of d), cap)
    masked                         w_t = exp(d_t) where low <= exp(d_t) <= high, else 0     (IcePop)
    sequence_mask                  w_t = 1 where low <= exp(x) <= high, else 0, x the response's sum of d (product) or
                                   its mean (geometric_mean)

The weight is a constant: no gradient flows through it, also where the old policy is the live one (one update per batch:
d is then taken from the live log-probs, detached, and the ratio in the surrogate is exactly 1). It multiplies the
surrogate's weight stream, and its normalisation stays what it was: what is masked is not made up for by the rest.
Divergences and the entropy are left as they are: they are sums over the vocabulary at prefixes that were visited, or
have an importance ratio of their own.

All comparisons are of logarithms, so that nothing overflows. A response's sum is over all its loss tokens on whatever
rank and micro-batch they are, by the first pass that `terms.py` describes.

Legend: _T rows, _B responses of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from megatron_dgrpo.algorithms.metrics import Metric, mean_of
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import Needs, Statistics, Term, TermResult, statistic
from megatron_dgrpo.config import objective as config
from megatron_dgrpo.errors import ObjectiveError


def mismatch(statistics: Statistics, streams: Streams) -> torch.Tensor:
    """d per row, detached: the trainer's log-prob at the weights that the engine had, minus the engine's."""
    if streams.behaviour_logprobs_N is None:
        raise ObjectiveError(
            "a correction compares with the rollout engine's log-probs, and the streams have none: keep"
            " behaviour_logprobs in the trajectories, or set correction=null"
        )
    logprob_T = statistic(statistics, "logprob")
    old_T = logprob_T if streams.old_logprobs_N is None else streams.old_logprobs_N.to(logprob_T)
    return old_T - streams.behaviour_logprobs_N.to(logprob_T)


@dataclass(frozen=True, kw_only=True)
class _Corrected(Term):
    """`term` with corrected weights. It bears the term's name."""

    name: str = ""
    term: Term

    def __post_init__(self) -> None:
        if self.name not in ("", self.term.name):
            raise ObjectiveError(f"a corrected {self.term.name!r} keeps that name, not {self.name!r}")
        if self.term.needs != "token":
            raise ObjectiveError(f"only a term of single tokens can be corrected; {self.term.name!r} needs more")
        object.__setattr__(self, "name", self.term.name)

    @property
    def statistics(self) -> tuple[str, ...]:
        return self.term.statistics

    def weigh(
        self, statistics: Statistics, streams: Streams, weight_T: torch.Tensor, metrics: Mapping[str, Metric]
    ) -> TermResult:
        """The term of tokens that count `weight_T` times."""
        plain_T = self.weights(statistics, streams)
        corrected = replace(streams, weights={self.name: plain_T * weight_T})
        result = self.term(statistics, corrected)
        own = {"correction/weight": mean_of(weight_T, plain_T != 0), **metrics}
        return replace(result, metrics=result.metrics | own)


@dataclass(frozen=True, kw_only=True)
class TokenCorrected(_Corrected):
    """Each token by its own d. `low` and `high` bound exp(d); beyond `high` the weight is `high`, or 0 with `mask`."""

    low: float = 0.0
    high: float
    mask: bool

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        log_T = mismatch(statistics, streams)
        outside_T = (log_T > math.log(self.high)) | (log_T < _log(self.low))
        weight_T = log_T.clamp(max=math.log(self.high)).exp()
        if self.mask:
            weight_T = weight_T.masked_fill(outside_T, 0.0)
        acting_T = self.weights(statistics, streams) != 0
        return self.weigh(statistics, streams, weight_T, {"correction/tokens": mean_of(outside_T, acting_T)})


@dataclass(frozen=True, kw_only=True)
class SequenceCorrected(_Corrected):
    """All tokens of a response by its sum or mean of d: truncated at `high`, or 1 within the bounds and 0 outside."""

    low: float = 0.0
    high: float
    mask: bool
    over: Literal["product", "geometric_mean"]
    needs: ClassVar[Needs] = "sequence"

    def summarise(self, statistics: Statistics, streams: Streams) -> dict[str, torch.Tensor]:
        """Per response: the sum of d over the rows with a weight, and their number."""
        if streams.num_samples is None:
            raise ObjectiveError(f"term {self.name!r} sums over responses: the streams must say how many there are")
        acting_T = self.weights(statistics, streams) != 0
        log_T = mismatch(statistics, streams).where(acting_T, 0.0).double()
        zeros_B = log_T.new_zeros(streams.num_samples)
        return {
            "log_B": zeros_B.index_add(0, streams.sample_N, log_T),
            "length_B": zeros_B.index_add(0, streams.sample_N, acting_T.double()),
        }

    def __call__(
        self, statistics: Statistics, streams: Streams, summary: Mapping[str, torch.Tensor] | None = None
    ) -> TermResult:
        assert summary is not None, "a sequence term is evaluated with the batch's summary"
        length_B = summary["length_B"].clamp(min=1.0)
        log_B = summary["log_B"] / length_B if self.over == "geometric_mean" else summary["log_B"]
        outside_B = (log_B > math.log(self.high)) | (log_B < _log(self.low))
        weight_B = 1.0 - outside_B.double() if self.mask else log_B.clamp(max=math.log(self.high)).exp()
        at_T = streams.sample_N
        acting_T = self.weights(statistics, streams) != 0
        once_T = acting_T.double() / length_B[at_T]  # the rows of a response, of all ranks, add up to 1
        metrics: dict[str, Metric] = {
            "correction/tokens": mean_of(outside_B[at_T], acting_T),
            "correction/sequences": mean_of(outside_B[at_T], once_T),
        }
        return self.weigh(statistics, streams, weight_B[at_T].to(statistics.logprob_T), metrics)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def corrected(term: Term, by: config.Correction | None) -> Term:
    """The term under the config's correction."""
    match by:
        case None:
            return term
        case config.Truncated(level="token"):
            return TokenCorrected(term=term, high=by.cap, mask=False)
        case config.Truncated():
            return SequenceCorrected(term=term, high=by.cap, mask=False, over="product")
        case config.Masked():
            return TokenCorrected(term=term, low=by.low, high=by.high, mask=True)
        case config.SequenceMask():
            return SequenceCorrected(term=term, low=by.low, high=by.high, mask=True, over=by.ratio)

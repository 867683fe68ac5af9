"""The loss: a sum of named terms, each with its factor, its weight stream and so its own denominator.

    loss = sum_k factor_k  sum_T  weight_kT  value_kT

`Loss.evaluate` gives the loss of some rows with d loss / d statistic; `attach` makes of it a scalar whose backward
hands exactly those coefficients to the statistics, so that schedules that call `backward` on a loss need to know
nothing else. The scalar's value is the true loss, also where coefficients stop a gradient that the value would have.

Terms that need more than their own token take a first pass: `Loss.summarise` on every micro-batch, the sum over all of
them and all ranks, then `evaluate(..., summary=that)`.

Legend: _T rows of the micro-batch (or of a chunk of it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_dgrpo.algorithms.metrics import Metric, Sum, merge, sum_of
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import Needs, Statistics, Term, TermResult, policy_metrics, statistic
from megatron_dgrpo.errors import ObjectiveError

Summary = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    loss: torch.Tensor  # float64 scalar, detached
    coefficients: dict[str, torch.Tensor]  # statistic -> d loss / d statistic, [T], factors included
    terms: dict[str, TermResult]  # as the terms gave them, without factors
    factors: dict[str, float]
    metrics: dict[str, Metric]

    def coefficients_of(self, term: str) -> dict[str, torch.Tensor]:
        """One term's share of the coefficients."""
        return {name: self.factors[term] * c_T for name, c_T in self.terms[term].coefficients.items()}


@dataclass(frozen=True)
class Loss:
    """Named terms. A factor of 0 leaves a term in the metrics and out of the gradient."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ObjectiveError(f"two terms of one loss have the same name ({names}): name them apart")

    @property
    def statistics(self) -> frozenset[str]:
        """What the heads must compute."""
        return frozenset({"logprob"}.union(*(term.statistics for term in self.terms)))

    @property
    def needs(self) -> Needs:
        """The widest need of any term: anything but `token` takes a first pass."""
        needs = {term.needs for term in self.terms}
        return "batch" if "batch" in needs else "sequence" if "sequence" in needs else "token"

    def summarise(self, statistics: Statistics, streams: Streams) -> Summary:
        """These rows' part of what terms must know of the whole batch; parts add up (`add_summaries`, all-reduce)."""
        return {
            f"{term.name}/{key}": value
            for term in self.terms
            for key, value in term.summarise(statistics, streams).items()
        }

    def evaluate(
        self,
        statistics: Statistics,
        streams: Streams,
        factors: Mapping[str, float] | None = None,
        summary: Mapping[str, torch.Tensor] | None = None,
    ) -> Evaluation:
        """Loss, coefficients and metrics of these rows. Terms without a factor have factor 1."""
        factors = self._factors(factors)
        if self.needs != "token" and summary is None:
            raise ObjectiveError(
                f"a term of this loss needs the whole {self.needs}: sum `summarise` over the batch first"
            )
        results = {term.name: term(statistics, streams, _own(summary, term.name)) for term in self.terms}
        logprob_T = statistic(statistics, "logprob")
        loss = logprob_T.new_zeros((), dtype=torch.float64)
        coefficients: dict[str, torch.Tensor] = {}
        metrics = [policy_metrics(statistics, streams)]
        for name, result in results.items():
            metrics.append(result.metrics)
            if factors[name] == 0.0:
                continue
            loss = loss + factors[name] * result.loss
            for key, c_T in result.coefficients.items():
                c_T = factors[name] * c_T
                coefficients[key] = coefficients[key] + c_T if key in coefficients else c_T
        bad_T = ~torch.isfinite(logprob_T)
        for values_T in (*(r.values_T for r in results.values()), *coefficients.values()):
            bad_T = bad_T | ~torch.isfinite(values_T)
        metrics.append({"loss": Sum(loss, degree=1), "nonfinite_rows": sum_of(bad_T)})
        return Evaluation(loss=loss, coefficients=coefficients, terms=results, factors=factors, metrics=merge(metrics))

    def _factors(self, factors: Mapping[str, float] | None) -> dict[str, float]:
        unknown = sorted(set(factors or {}) - {term.name for term in self.terms})
        if unknown:
            raise ObjectiveError(f"factors for unknown terms {unknown}: the loss has {[t.name for t in self.terms]}")
        return {term.name: float((factors or {}).get(term.name, 1.0)) for term in self.terms}


def _own(summary: Mapping[str, torch.Tensor] | None, name: str) -> Summary | None:
    if summary is None:
        return None
    return {key.removeprefix(f"{name}/"): v for key, v in summary.items() if key.startswith(f"{name}/")}


def add_summaries(parts: Iterable[Summary]) -> Summary:
    total: Summary = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value
    return total


def attach(evaluation: Evaluation, statistics: Statistics) -> torch.Tensor:
    """A scalar with the loss as its value, whose backward sends the coefficients to the statistics.

    A factor on the scalar (a schedule's loss scale) multiplies the coefficients. Without rows, or without coefficients,
    it is still connected to the log-probs, so that `backward` may be called on every rank.
    """
    names = sorted(evaluation.coefficients) or ["logprob"]
    tensors = [getattr(statistics, f"{name}_T") for name in names]
    coefficients = [evaluation.coefficients.get(n, torch.zeros_like(t)) for n, t in zip(names, tensors, strict=True)]
    loss = evaluation.loss.to(tensors[0].dtype)
    return _Attach.apply(loss, *tensors, *(c.to(t) for c, t in zip(coefficients, tensors, strict=True)))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, *tensors_and_coefficients):
        half = len(tensors_and_coefficients) // 2
        ctx.save_for_backward(*tensors_and_coefficients[half:])
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        coefficients = ctx.saved_tensors
        return None, *(grad * c_T for c_T in coefficients), *(None for _ in coefficients)


def nonfinite_report(
    evaluation: Evaluation, statistics: Statistics, streams: Streams, names: Sequence[str] = (), limit: int = 8
) -> list[str]:
    """Which terms, samples and positions are NaN or infinite: call it where the reduced `nonfinite_rows` is not 0.

    The count is a metric, so all ranks learn of it in the same reduction and stop together, before the update.
    """
    bad, found = evaluation.metrics["nonfinite_rows"], list[str]()
    assert isinstance(bad, Sum)
    if float(bad.total) == 0:
        return found
    parts = {"log-prob": statistic(statistics, "logprob")}
    parts |= {f"term {name}": result.values_T for name, result in evaluation.terms.items()}
    parts |= {f"d loss / d {name}": c_T for name, c_T in evaluation.coefficients.items()}
    for what, values_T in parts.items():
        for row in (~torch.isfinite(values_T)).nonzero().flatten().tolist()[:limit]:
            sample = int(streams.sample_N[row])
            name = names[sample] if names else f"sample {sample}"
            found.append(
                f"{what} is {float(values_T[row])} at row {row}: {name}, position"
                f" {int(streams.position_N[row])}, token {int(streams.targets_N[row])}"
            )
    return found

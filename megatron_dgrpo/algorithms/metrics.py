"""Metrics that add up: what micro-batches and ranks report, so that the whole batch's figure is exact.

A mean travels as its sum and its weight, never as a mean of means. `pack` makes one vector for a SUM and one for a MAX
reduction; every rank must hold the same names, so what reports a metric reports it for zero rows, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch


@dataclass(frozen=True)
class Mean:
    """total / weight; left out of the values when the weight is 0."""

    total: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Sum:
    total: torch.Tensor


@dataclass(frozen=True)
class Max:
    """Left out of the values when there was nothing to take it of (-inf)."""

    value: torch.Tensor


@dataclass(frozen=True)
class Quantile:
    """A quantile out of counts per bin [S], which add up; left out of the values when nothing was counted.

    Bin i holds what is above lowest x exp((i - 1) step) and at most lowest x exp(i step); its upper end is the value.
    """

    counts: torch.Tensor
    share: float
    lowest: float
    step: float

    def value(self) -> float | None:
        cumulative = self.counts.cumsum(0)
        if float(cumulative[-1]) == 0.0:
            return None
        index = int((cumulative < self.share * cumulative[-1]).sum())
        return self.lowest * math.exp(index * self.step)


Metric = Mean | Sum | Max | Quantile


def mean_of(values_T: torch.Tensor, weight_T: torch.Tensor | None = None) -> Mean:
    """The mean over rows, each counting once or by its weight."""
    values_T = values_T.detach().double()
    if weight_T is None:
        return Mean(values_T.sum(), values_T.new_tensor(float(values_T.numel())))
    weight_T = weight_T.detach().double()
    return Mean((values_T * weight_T).where(weight_T != 0, 0.0).sum(), weight_T.sum())


def sum_of(values_T: torch.Tensor) -> Sum:
    return Sum(values_T.detach().double().sum())


def max_of(values_T: torch.Tensor, where_T: torch.Tensor | None = None) -> Max:
    values_T = values_T.detach().double()
    if where_T is not None:
        values_T = values_T.where(where_T, -math.inf)
    return Max(values_T.max() if values_T.numel() else values_T.new_tensor(-math.inf))


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """The metrics of several micro-batches (or of several terms) as one."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _add(name, merged[name], metric) if name in merged else metric
    return merged


def _add(name: str, a: Metric, b: Metric) -> Metric:
    if isinstance(a, Mean) and isinstance(b, Mean):
        return Mean(a.total + b.total, a.weight + b.weight)
    if isinstance(a, Sum) and isinstance(b, Sum):
        return Sum(a.total + b.total)
    if isinstance(a, Max) and isinstance(b, Max):
        return Max(torch.maximum(a.value, b.value))
    if isinstance(a, Quantile) and isinstance(b, Quantile):
        return replace(a, counts=a.counts + b.counts)
    raise TypeError(f"metric {name} is a {type(a).__name__} in one place and a {type(b).__name__} in another")


def pack(metrics: Mapping[str, Metric]) -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 vector to reduce with SUM and one to reduce with MAX, in the order of the sorted names."""
    sums: list[torch.Tensor] = []
    maxima: list[torch.Tensor] = []
    for name in sorted(metrics):
        match metrics[name]:
            case Mean(total, weight):
                sums += [total, weight]
            case Sum(total):
                sums.append(total)
            case Max(value):
                maxima.append(value)
            case Quantile(counts):
                sums.append(counts)
    flat = lambda parts: torch.cat([p.double().reshape(-1) for p in parts])  # noqa: E731
    vector = lambda parts: flat(parts) if parts else torch.zeros(0).double()  # noqa: E731
    return vector(sums), vector(maxima)


def unpack(metrics: Mapping[str, Metric], sums: torch.Tensor, maxima: torch.Tensor) -> dict[str, Metric]:
    """The inverse of `pack`: the names and kinds are those of `metrics`, the figures the reduced ones."""
    sum_at, max_at = iter(sums), iter(maxima)
    unpacked: dict[str, Metric] = {}
    for name in sorted(metrics):
        match metrics[name]:
            case Mean():
                unpacked[name] = Mean(next(sum_at), next(sum_at))
            case Sum():
                unpacked[name] = Sum(next(sum_at))
            case Max():
                unpacked[name] = Max(next(max_at))
            case Quantile(counts) as quantile:
                unpacked[name] = replace(quantile, counts=torch.stack(list(islice(sum_at, len(counts)))))
    return unpacked


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain numbers, for logs."""
    numbers: dict[str, float] = {}
    for name, metric in metrics.items():
        match metric:
            case Mean(total, weight):
                if float(weight) != 0.0:
                    numbers[name] = float(total) / float(weight)
            case Sum(total):
                numbers[name] = float(total)
            case Max(value):
                if float(value) != -math.inf:
                    numbers[name] = float(value)
            case Quantile() as quantile:
                if (at := quantile.value()) is not None:
                    numbers[name] = at
    return numbers

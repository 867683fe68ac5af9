"""What to look at when the joint objective does not do what it should.

- By position: each term's rows, entropy and the teacher's mass in buckets of the token's position, because
  what goes wrong at 100,000 tokens is invisible in a mean over all of them.
- Sign: the share of rows where two terms push the sampled token's logit in opposite directions, from the statistics
  alone, at every step. With l, r the log-probs of that token under student and teacher, p = e^l, q = e^r, the
  derivatives by its logit are
      log-prob  1 - p      entropy  -p (l + H)      KL(student || teacher)  p (l - r - KL)      forward KL  p - q
  where the KLs' p and l are those of the distribution restricted to the teacher's ids.
- Balance: the norm of each term's gradient by the hidden states, and their cosines, every so many steps; each term
  costs one more gradient of the rows. Squares and dot products add up over rows, so they are what is reduced;
  `balance_values` forms norms and cosines of the sums.

Legend: _T rows, _TH rows x hidden, _B position buckets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch

from megatron_dgrpo.algorithms.losses import Evaluation
from megatron_dgrpo.algorithms.metrics import Mean, Metric, Sum
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import Statistics, log_shared_mass

POSITION_EDGES = (1024, 4096, 16384, 32768, 65536, 131072)
"""Buckets begin at 0 and at each of these."""

OBSERVED = (
    "entropy",
    "kl",
    "teacher_entropy",
    "outside_mass",
    "removed_mass",
    "top1_agreement",
    "topk_student_mass",
    "topk_teacher_mass",
    "topk_overlap",
)
"""Statistics that are reported by position wherever the heads computed them."""


def by_position(
    evaluation: Evaluation, statistics: Statistics, streams: Streams, edges: Sequence[int] = POSITION_EDGES
) -> dict[str, Metric]:
    """Means per bucket, named `<series>@<first position>`; empty buckets are there with weight 0."""
    bounds = torch.tensor(list(edges), device=streams.position_N.device)
    bucket_T = torch.bucketize(streams.position_N, bounds, right=True)
    metrics: dict[str, Metric] = {}
    for name, (values_T, counts_T) in _series(evaluation, statistics, streams).items():
        counts_T = counts_T.double()
        values_T = (values_T.detach().double() * counts_T).where(counts_T != 0, 0.0)
        zeros_B = values_T.new_zeros(len(edges) + 1)
        total_B, weight_B = zeros_B.index_add(0, bucket_T, values_T), zeros_B.index_add(0, bucket_T, counts_T)
        for i, first in enumerate((0, *edges)):
            metrics[f"{name}@{first}"] = Mean(total_B[i], weight_B[i])
    return metrics


def _series(
    evaluation: Evaluation, statistics: Statistics, streams: Streams
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> values and the rows that count."""
    logprob_T = statistics.logprob_T.detach()
    every_T = torch.ones_like(logprob_T, dtype=torch.bool)
    series = {"tokens": (every_T, every_T)}
    for name, result in evaluation.terms.items():
        series |= {f"{name}/{key}": (row_T, result.acting_T) for key, row_T in result.rows.items()}
    for name in OBSERVED:
        value_T = getattr(statistics, f"{name}_T", None)
        if value_T is not None:
            series[f"row/{name}"] = (value_T, every_T)
    teacher_T = getattr(statistics, "teacher_logprob_T", None)
    if teacher_T is not None:
        series["row/teacher_mass"] = (teacher_T.exp(), every_T)
    return series


def sign_disagreement(evaluation: Evaluation, statistics: Statistics) -> dict[str, Metric]:
    """Per pair of terms: the share of the rows that both push on where they push the sampled token apart.

    A term is left out where its slope needs a statistic that was not computed.
    """
    slopes = {name: _target_slope(evaluation.coefficients_of(name), statistics) for name in evaluation.terms}
    metrics: dict[str, Metric] = {}
    for a, b in combinations(sorted(name for name, slope in slopes.items() if slope is not None), 2):
        product_T = torch.sign(slopes[a]) * torch.sign(slopes[b])  # type: ignore[arg-type]
        metrics[f"disagree/{a}.{b}"] = Mean((product_T < 0).double().sum(), (product_T != 0).double().sum())
    return metrics


def _target_slope(coefficients: Mapping[str, torch.Tensor], statistics: Statistics) -> torch.Tensor | None:
    """d loss / d logit of the sampled token (times the temperature), row by row."""
    known = {name: getattr(statistics, f"{name}_T", None) for name in ("logprob", "entropy", "kl", "teacher_logprob")}
    l_T, h_T, kl_T, r_T = (None if x is None else x.detach() for x in known.values())
    assert l_T is not None
    p_T = l_T.exp()
    shared_l_T = l_T - log_shared_mass(statistics)
    shared_p_T = shared_l_T.exp()
    lacking_T = torch.zeros_like(l_T, dtype=torch.bool) if r_T is None else r_T == -torch.inf
    slope_T = torch.zeros_like(l_T)
    for name, c_T in coefficients.items():
        if name == "logprob":
            slope_T = slope_T + c_T * (1 - p_T)
        elif name == "entropy" and h_T is not None:
            slope_T = slope_T - c_T * p_T * (l_T + h_T)
        elif name == "kl" and r_T is not None and kl_T is not None:
            pull_T = shared_p_T * (shared_l_T - r_T - kl_T)
            slope_T = slope_T + c_T * pull_T.masked_fill(lacking_T, 0.0)
        elif name == "forward_kl" and r_T is not None:
            slope_T = slope_T + c_T * (shared_p_T - r_T.exp()).masked_fill(lacking_T, 0.0)
        else:
            return None
    return slope_T


def gradient_balance(
    evaluation: Evaluation, hidden_gradient: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
) -> dict[str, Metric]:
    """Squares and dot products of the terms' hidden-state gradients, factors included, to be added up and reduced.

    `hidden_gradient` maps coefficients to the rows' whole gradient [T, H] and must leave parameters' gradients alone.
    """
    gradient_TH = {
        name: hidden_gradient(evaluation.coefficients_of(name)).double() for name in sorted(evaluation.terms)
    }
    metrics: dict[str, Metric] = {f"gradient/{name}/square": Sum(g.square().sum()) for name, g in gradient_TH.items()}
    for a, b in combinations(gradient_TH, 2):
        dot_T = (gradient_TH[a] * gradient_TH[b]).sum(-1)
        metrics[f"gradient/{a}.{b}/dot"] = Sum(dot_T.sum())
        metrics[f"gradient/{a}.{b}/rows_opposed"] = Mean((dot_T < 0).double().sum(), (dot_T != 0).double().sum())
    return metrics


def balance_values(numbers: Mapping[str, float]) -> dict[str, float]:
    """Norms and cosines, in the place of the squares and dot products among some reduced metrics' values."""
    kept = {k: v for k, v in numbers.items() if not (k.startswith("gradient/") and k.endswith(("/square", "/dot")))}
    norms = {
        key.removeprefix("gradient/").removesuffix("/square"): math.sqrt(value)
        for key, value in numbers.items()
        if key.startswith("gradient/") and key.endswith("/square")
    }
    kept |= {f"gradient/{name}/norm": norm for name, norm in norms.items()}
    for a, b in combinations(sorted(norms), 2):
        if norms[a] > 0 and norms[b] > 0:
            kept[f"gradient/{a}.{b}/cosine"] = numbers[f"gradient/{a}.{b}/dot"] / (norms[a] * norms[b])
    return kept

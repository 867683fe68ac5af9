"""Preflight: does the teacher's signal arrive, and is it the right one? Callable before the first update.

Four questions, put to the same heads, terms and streams that training uses, on a few rows of real hidden states:

1. A teacher that *is* the student (its hidden states, its head) has KL 0. Anything else means that the two sides are
   treated differently: another temperature, another slice of the vocabulary, another dtype.
2. Its gradient is that of the loss without the teacher's terms.
3. A perturbed teacher changes the gradient: else its signal is dropped on the way, or its gradient is stopped.
4. Where the teacher has the student's weights, its own path (its forward, its rows, their redistribution, its head)
   gives the student's distribution up to the rounding of its type (`PATH_TOLERANCE`).

The measured figures are reported whatever the outcome. Nothing is raised here: every rank reports, and the caller
raises on all of them together. Gradients are taken by the hidden states; hand in heads whose weights are detached.

Legend: _T rows, _TH rows x hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_dgrpo.algorithms.losses import Loss, attach
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import Statistics, statistic
from megatron_dgrpo.errors import ObjectiveError, listing

Score = Callable[[torch.Tensor, torch.Tensor], Statistics]
"""Student and teacher hidden states to statistics, `kl` among them, with a graph to the student's."""

KL_TOLERANCE = 1e-6
"""Largest KL of a row between a distribution and itself."""

GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Largest share of the gradient that a teacher equal to the student may add, by the type of the hidden states."""

PATH_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest mean KL between a model and itself as its own teacher: both forwards round, each in its own way."""

_TEACHER_STATISTICS = ("kl", "forward_kl", "jsd", "teacher_")


@dataclass(frozen=True)
class Preflight:
    problems: tuple[str, ...]
    measured: dict[str, float]

    def check(self) -> None:
        if self.problems:
            raise ObjectiveError(listing("the objective is not what the configuration says:", self.problems))


@dataclass(frozen=True)
class Rows:
    """A few rows: the student's hidden states, the teacher's of the same tokens, and their streams."""

    streams: Streams
    hidden_TH: torch.Tensor
    teacher_TH: torch.Tensor


def preflight(
    loss: Loss,
    factors: Mapping[str, float],
    rows: Rows,
    *,
    own: Score,
    pair: Score,
    temperature: float,
    seed: int = 0,
) -> Preflight:
    """Questions 1 to 3. `own` scores with the student's head on both sides, `pair` with each side's own."""
    teacher_terms = [t.name for t in loss.terms if any(s.startswith(_TEACHER_STATISTICS) for s in t.statistics)]
    others = [t.name for t in loss.terms if t.name not in teacher_terms]
    active = [name for name in teacher_terms if factors.get(name, 1.0) != 0.0]
    hidden_TH, problems = rows.hidden_TH.detach(), []

    kl_T = _kl(own, hidden_TH, hidden_TH)
    measured = {"identical_kl": _largest(kl_T)}
    if not measured["identical_kl"] <= KL_TOLERANCE:
        problems.append(
            f"a teacher identical to the student has a KL of {measured['identical_kl']:.3g}, not <= {KL_TOLERANCE:g}"
            f" (row {int(kl_T.nan_to_num(torch.inf).argmax())}): {_cause(own, hidden_TH, hidden_TH, temperature)}"
        )

    def gradient(score: Score, teacher_TH: torch.Tensor, silent: list[str]) -> torch.Tensor:
        return _gradient(loss, {**factors, **dict.fromkeys(silent, 0.0)}, rows.streams, score, hidden_TH, teacher_TH)

    alone_TH = gradient(own, hidden_TH, teacher_terms)
    added = float((gradient(own, hidden_TH, []) - alone_TH).norm())
    perturbed_TH = rows.teacher_TH.detach() + 0.1 * _noise(rows.teacher_TH, seed)
    before_TH, after_TH = gradient(pair, rows.teacher_TH.detach(), others), gradient(pair, perturbed_TH, others)
    teaching = max(float(before_TH.norm()), float(after_TH.norm()))
    measured |= {
        "other_gradient": float(alone_TH.norm()),
        "teacher_gradient": float(before_TH.norm()),
        "identical_adds": _ratio(added, max(float(alone_TH.norm()), teaching)),
        "perturbed_changes": _ratio(float((after_TH - before_TH).norm()), teaching),
    }
    tolerance = GRADIENT_TOLERANCE[hidden_TH.dtype]
    if not measured["identical_adds"] <= tolerance:
        problems.append(
            f"a teacher identical to the student adds {measured['identical_adds']:.3g} of the gradient's norm to it,"
            f" not <= {tolerance:g}: it must leave the other terms' gradient alone"
        )
    if active and not measured["perturbed_changes"] > tolerance:
        problems.append(
            f"a perturbed teacher changes the gradient of {', '.join(active)} by {measured['perturbed_changes']:.3g} of"
            " its norm: the teacher's signal is dropped, or its gradient stopped, before the hidden states"
        )
    return Preflight(tuple(problems), measured)


def preflight_path(rows: Rows, *, pair: Score, temperature: float) -> Preflight:
    """Question 4, for a teacher with the student's weights: `rows.teacher_TH` came through its real path."""
    hidden_TH, teacher_TH = rows.hidden_TH.detach(), rows.teacher_TH.detach()
    kl_T = _kl(pair, hidden_TH, teacher_TH)
    tolerance = PATH_TOLERANCE[teacher_TH.dtype]
    mean = float(kl_T.mean()) if kl_T.numel() else 0.0
    problems: tuple[str, ...] = ()
    if not mean <= tolerance:
        cause = _cause(pair, hidden_TH, teacher_TH, temperature)
        problems = (
            f"a teacher with the student's weights has a mean KL of {mean:.3g} through its own path, not <="
            f" {tolerance:g} ({teacher_TH.dtype}): {cause}",
        )
    return Preflight(problems, {"path_kl": mean, "path_kl_max": _largest(kl_T)})


def _cause(score: Score, hidden_TH: torch.Tensor, teacher_TH: torch.Tensor, temperature: float) -> str:
    """Scaling the teacher's hidden states undoes a temperature that only one side has, up to their rounding."""
    found = _largest(_kl(score, hidden_TH, teacher_TH))
    for scale, side in ((1.0 / temperature, "student's"), (temperature, "teacher's")):
        if temperature != 1.0 and _largest(_kl(score, hidden_TH, scale * teacher_TH)) <= 0.01 * found:
            return f"the temperature {temperature:g} divides the {side} logits once more often than the other side's"
    return "the two sides differ in their rows, their vocabulary or their arithmetic"


def _gradient(
    loss: Loss,
    factors: Mapping[str, float],
    streams: Streams,
    score: Score,
    hidden_TH: torch.Tensor,
    teacher_TH: torch.Tensor,
) -> torch.Tensor:
    leaf_TH = hidden_TH.clone().requires_grad_()
    statistics = score(leaf_TH, teacher_TH)
    summary = None if loss.needs == "token" else loss.summarise(statistics, streams)
    scalar = attach(loss.evaluate(statistics, streams, factors, summary), statistics)
    (gradient_TH,) = torch.autograd.grad(scalar, leaf_TH, allow_unused=True)
    return torch.zeros_like(hidden_TH).double() if gradient_TH is None else gradient_TH.double()


def _kl(score: Score, hidden_TH: torch.Tensor, teacher_TH: torch.Tensor) -> torch.Tensor:
    return statistic(score(hidden_TH, teacher_TH), "kl").abs().double()


def _noise(like_TH: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return like_TH.detach().std() * torch.randn(like_TH.shape, generator=generator).to(like_TH)


def _largest(values_T: torch.Tensor) -> float:
    return float(values_T.max()) if values_T.numel() else 0.0


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0

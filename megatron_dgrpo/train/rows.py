"""The loss rows of a micro-batch: from hidden states to statistics, with the heads of both models.

Legend: _R loss rows, _RH rows x hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.heads import HeadShard, RowStatistics, row_statistics, row_statistics_with_gradients


@dataclass(frozen=True)
class LossRows:
    hidden_RH: torch.Tensor
    targets_R: torch.Tensor
    streams: Streams
    head: HeadShard
    temperature: float
    group: dist.ProcessGroup
    teacher_RH: torch.Tensor | None = None
    teacher_head: HeadShard | None = None
    options: Mapping[str, Any] | None = None
    """Further arguments of the heads: the JSD's alpha, the number of likeliest ids."""

    def score(self, want: Collection[str]) -> RowStatistics:
        """Statistics that pass any gradients on to hidden states and head."""
        return row_statistics(self.hidden_RH, self.head, self.targets_R, want=want, **self._arguments())

    def score_with_gradients(
        self, want: Collection[str], coefficients: Callable[[RowStatistics, slice], Mapping[str, torch.Tensor]]
    ) -> tuple[RowStatistics, torch.Tensor]:
        """Statistics, and a scalar 0 whose backward hands over the gradients that the coefficients ask for: the faster
        way wherever a row's coefficients need that row alone."""
        return row_statistics_with_gradients(
            self.hidden_RH, self.head, self.targets_R, want=want, coefficients=coefficients, **self._arguments()
        )

    def apart(self) -> LossRows:
        """The same rows with hidden states that collect a gradient of their own, and a head that collects none."""
        head = replace(self.head, weight_VH=self.head.weight_VH.detach())
        return replace(self, hidden_RH=self.hidden_RH.detach().requires_grad_(), head=head)

    def first(self, count: int) -> LossRows:
        at = slice(count)
        return replace(
            self,
            hidden_RH=self.hidden_RH[at],
            targets_R=self.targets_R[at],
            streams=self.streams.select(at),
            teacher_RH=None if self.teacher_RH is None else self.teacher_RH[at],
        )

    def hidden_gradient(self, want: Collection[str]) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
        """A function from coefficients to the gradient of the rows' hidden states; it leaves all others alone."""
        rows = self.apart()
        with torch.enable_grad():
            statistics = rows.score(want)

        def gradient(coefficients: Mapping[str, torch.Tensor]) -> torch.Tensor:
            if not coefficients:
                return torch.zeros_like(rows.hidden_RH)
            outputs = [getattr(statistics, f"{name}_T") for name in coefficients]
            grads = [c.to(x) for c, x in zip(coefficients.values(), outputs, strict=True)]
            return torch.autograd.grad(outputs, rows.hidden_RH, grads, retain_graph=True)[0]

        return gradient

    def _arguments(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "group": self.group,
            "teacher_hidden_TH": self.teacher_RH,
            "teacher_head": self.teacher_head if self.teacher_RH is not None else None,
            "nonfinite": "keep",  # counted, reduced over all ranks, and refused by all of them together
            **(self.options or {}),
        }

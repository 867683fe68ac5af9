"""The loss rows of a micro-batch: from hidden states to statistics, with the heads of both models.

Each row has at most one teacher. Rows of several teachers are evaluated teacher by teacher, as rows of their own, and
their statistics put back into the order of the micro-batch. Which rows are whose is the same on all ranks of the
tensor-parallel group, and so are the collectives of the heads.

Legend: _R loss rows, _S those of one teacher, _RH rows x hidden (the teacher's own hidden size, where they are its).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.heads import HeadShard, RowStatistics, row_statistics, row_statistics_with_gradients

Coefficients = Callable[[RowStatistics, slice | torch.Tensor], Mapping[str, torch.Tensor]]
"""From the statistics of some rows, and which they are, to d loss / d statistic."""


@dataclass(frozen=True)
class Taught:
    """The rows of a micro-batch that one teacher scored."""

    index_S: torch.Tensor  # ascending
    hidden_SH: torch.Tensor
    head: HeadShard


@dataclass(frozen=True)
class LossRows:
    hidden_RH: torch.Tensor
    targets_R: torch.Tensor
    streams: Streams
    head: HeadShard
    temperature: float
    group: dist.ProcessGroup
    taught: tuple[Taught, ...] = ()
    """By teacher; between them they have every row. None: there is no teacher."""
    options: Mapping[str, Any] | None = None
    """Further arguments of the heads: the JSD's alpha, the number of likeliest ids."""

    def score(self, want: Collection[str]) -> RowStatistics:
        """Statistics that pass any gradients on to hidden states and head."""
        parts = self._by_teacher()
        if len(parts) > 1:
            return _in_order(parts, [self.part(taught).score(want) for taught in parts])
        return row_statistics(self.hidden_RH, self.head, self.targets_R, want=want, **self._arguments(parts))

    def score_with_gradients(
        self, want: Collection[str], coefficients: Coefficients
    ) -> tuple[RowStatistics, torch.Tensor]:
        """Statistics, and a scalar 0 whose backward hands over the gradients that the coefficients ask for: the faster
        way wherever a row's coefficients need that row alone."""
        parts = self._by_teacher()
        if len(parts) > 1:

            def of_part(taught: Taught) -> tuple[RowStatistics, torch.Tensor]:
                return self.part(taught).score_with_gradients(want, lambda s, at: coefficients(s, taught.index_S[at]))

            found = [of_part(taught) for taught in parts]
            carrier = torch.stack([carrier for _, carrier in found]).sum()
            return _in_order(parts, [statistics for statistics, _ in found]), carrier
        return row_statistics_with_gradients(
            self.hidden_RH, self.head, self.targets_R, want=want, coefficients=coefficients, **self._arguments(parts)
        )

    def part(self, taught: Taught) -> LossRows:
        """The rows of one teacher, as rows that have no other."""
        index_S = taught.index_S
        return replace(
            self,
            hidden_RH=self.hidden_RH.index_select(0, index_S),
            targets_R=self.targets_R[index_S],
            streams=self.streams.select(index_S),
            taught=(replace(taught, index_S=torch.arange(len(index_S), device=index_S.device)),),
        )

    def _by_teacher(self) -> Sequence[Taught]:
        """The teachers that have rows; one of them where none has any, so that there are statistics of no row."""
        return [taught for taught in self.taught if len(taught.index_S)] or self.taught[:1]

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
            taught=tuple(_first(taught, count) for taught in self.taught),
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

    def _arguments(self, parts: Sequence[Taught]) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "group": self.group,
            "teacher_hidden_TH": parts[0].hidden_SH if parts else None,
            "teacher_head": parts[0].head if parts else None,
            "nonfinite": "keep",  # counted, reduced over all ranks, and refused by all of them together
            **(self.options or {}),
        }


def _first(taught: Taught, count: int) -> Taught:
    kept = int((taught.index_S < count).sum())
    return Taught(taught.index_S[:kept], taught.hidden_SH[:kept], taught.head)


def _in_order(parts: Sequence[Taught], found: Sequence[RowStatistics]) -> RowStatistics:
    """Statistics of the parts as those of all rows."""
    back_R = torch.cat([taught.index_S for taught in parts]).argsort()
    names = [field.name for field in fields(RowStatistics) if getattr(found[0], field.name) is not None]
    return RowStatistics(**{name: torch.cat([getattr(part, name) for part in found])[back_R] for name in names})

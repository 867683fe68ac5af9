"""Rows of a dataset, and the order in which training takes them.

The order is a function of (seed, epoch) and nothing else, and a batch one of (step, size): whoever resumes needs only
the counters. It is drawn from the raw stream of a counter-based generator, which numpy keeps from version to version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from megatron_dgrpo.config.schema import Dataset, RoutedDataset
from megatron_dgrpo.data.jsonl import JsonLines


@dataclass(frozen=True)
class PromptRow:
    """One row. Its name is the file's name and the line; `PromptSource` adds `@epoch`."""

    name: str
    prompt: str
    answer: str
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The whole row, for rewards that need more than the answer."""
    teacher: str | None = None
    """Name of the teacher that scores it, where the data say so."""


class Rows(Sequence[PromptRow]):
    """A dataset's rows in the file's order. All of them are checked when it is made, none is kept in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._teacher = dataset.teacher if isinstance(dataset, RoutedDataset) else None
        self._lines = JsonLines(dataset.path, (dataset.prompt, dataset.answer, *filter(None, [self._teacher])))

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> PromptRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptRow]: ...
    def __getitem__(self, index: int | slice) -> PromptRow | list[PromptRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        row = self._lines[index]
        name = f"{self._lines.path.name}:{index + 1}"
        teacher = row[self._teacher] if self._teacher else None
        return PromptRow(name, row[self._dataset.prompt], row[self._dataset.answer], row, teacher)


def read_rows(dataset: Dataset) -> Rows:
    return Rows(dataset)


class PromptSource:
    """Rows without end, shuffled anew for every epoch."""

    def __init__(self, dataset: Dataset, *, seed: int) -> None:
        self.rows = Rows(dataset)
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def take(self, step: int, count: int) -> list[PromptRow]:
        """The rows of batch `step` (from 0) when every batch has `count`.

        Names are unique within a batch, also in one that spans epochs and holds a row twice.
        """
        positions = range(step * count, (step + 1) * count)
        return [self._row(*divmod(position, len(self.rows))) for position in positions]

    def _row(self, epoch: int, place: int) -> PromptRow:
        row = self.rows[int(self.order(epoch)[place])]
        return replace(row, name=f"{row.name}@{epoch}")

    def order(self, epoch: int) -> np.ndarray:
        """Which row comes when, in an epoch."""
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            drawn = np.random.Philox(key=np.asarray([self._seed, epoch], np.uint64)).random_raw(len(self.rows))
            self._orders[epoch] = np.argsort(drawn, kind="stable")
        return self._orders[epoch]

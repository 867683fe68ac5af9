"""Rows of a dataset, and the order in which training takes them.

A source's order is a function of (seed, epoch, its place in the mixture) and nothing else. Of a mixture, the next row
comes from the source that is furthest behind its share of the tokens: the one with the least tokens / share, the first
of equals. So after any number of rows, every source has had its share to within one row of each, over any window; and
whoever resumes needs only the counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np

from megatron_dgrpo.config.data import Dataset, Source
from megatron_dgrpo.data.bad_rows import BadRows
from megatron_dgrpo.data.jsonl import JsonLines
from megatron_dgrpo.data.patience import Patience
from megatron_dgrpo.data.rows import PromptRow, make_row, row_problems
from megatron_dgrpo.data.shuffle import shuffled
from megatron_dgrpo.data.stream import Stream
from megatron_dgrpo.data.table import Table
from megatron_dgrpo.errors import DataError


class Rows(Sequence[PromptRow]):
    """A source's rows in their order. All of them are checked when it is made, none is kept in memory."""

    def __init__(self, source: Source, *, needs_answer: bool = False) -> None:
        self.source = source
        self._rows: JsonLines | Table
        if source.path is not None and source.path.endswith(".jsonl"):
            self._rows = JsonLines(
                source.path, lambda row: row_problems(source, row, needs_answer=needs_answer), Patience(source)
            )
        else:
            self._rows = Table(source, needs_answer=needs_answer)
        if source.on_bad_row == "error":
            fields = ", ".join(map(repr, source.text_fields))
            what = f"text in the fields {fields}" if fields else f"a conversation in the field {source.messages!r}"
            self.bad.refuse(f"one JSON object with {what}" if isinstance(self._rows, JsonLines) else f"one with {what}")
        if not len(self._rows):
            bad = f" ({self.bad.summary()})" if self.bad.count else ""
            raise DataError(f"{source.where} is empty: it needs a row at least{bad}")

    @property
    def bad(self) -> BadRows:
        """What became of rows that cannot be used."""
        return self._rows.bad

    @property
    def num_retries(self) -> int:
        """Of reads that failed at first."""
        return self._rows.patience.num_retries

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> PromptRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptRow]: ...
    def __getitem__(self, index: int | slice) -> PromptRow | list[PromptRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.source.where} has {len(self)} rows and no row {index}")
        index += len(self) if index < 0 else 0
        return make_row(self.source, int(self._rows.numbers[index]), self._rows[index])


class _Shuffled:
    """A source's rows without end, shuffled anew for every epoch."""

    def __init__(self, rows: Rows, *, seed: int, index: int) -> None:
        self.rows = rows
        self._seed, self._index = seed, index
        self._drawn = 0
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    @property
    def bad(self) -> BadRows:
        return self.rows.bad

    @property
    def num_retries(self) -> int:
        return self.rows.num_retries

    def draw(self) -> PromptRow:
        epoch, place = divmod(self._drawn, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self.rows), self._seed, epoch, self._index)
        self._drawn += 1
        row = self.rows[int(self._order[place])]
        return replace(row, name=f"{row.name}@{epoch}")

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "rows": len(self.rows)}

    def restore(self, state: dict[str, Any]) -> None:
        if state["rows"] != len(self.rows):
            raise DataError(
                f"{self.rows.source.where} has {len(self.rows)} rows and had {state['rows']} when its place was saved: "
                "give it the data it was started with"
            )
        self._drawn = state["drawn"]


class PromptSource:
    """Rows without end, of one source or of a mixture. `num_tokens` counts a row's tokens, for the shares."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        num_tokens: Callable[[PromptRow], int] = lambda row: 1,
        needs_answer: bool = False,
    ) -> None:
        self._num_tokens = num_tokens
        self._shares = [source.share for source in dataset.sources]
        self._own_names = [source.name for source in dataset.sources]
        self._names = _unique(self._own_names)
        self._sources: list[_Shuffled | Stream] = [
            Stream(source, seed=seed, index=index, needs_answer=needs_answer)
            if source.streaming
            else _Shuffled(Rows(source, needs_answer=needs_answer), seed=seed, index=index)
            for index, source in enumerate(dataset.sources)
        ]
        self._tokens = [0] * len(self._sources)

    @property
    def num_rows(self) -> int | None:
        """Of all sources together; unknown where one of them is a stream."""
        counts = [len(source.rows) for source in self._sources if isinstance(source, _Shuffled)]
        return sum(counts) if len(counts) == len(self._sources) else None

    def take(self, count: int) -> list[PromptRow]:
        """The next rows. Names are unique among them, also where they span epochs and hold a row twice."""
        return [self._next() for _ in range(count)]

    def take_tokens(self, least: int) -> list[PromptRow]:
        """The next rows that have so many tokens together, the last of them included."""
        rows, total = [], 0
        while total < least:
            before = sum(self._tokens)
            rows.append(self._next())
            total += sum(self._tokens) - before
        return rows

    def _next(self) -> PromptRow:
        behind = [tokens / share for tokens, share in zip(self._tokens, self._shares, strict=True)]
        chosen = behind.index(min(behind))
        row = self._sources[chosen].draw()
        self._tokens[chosen] += self._num_tokens(row)
        return replace(row, name=self._names[chosen] + row.name.removeprefix(self._own_names[chosen]))

    def facts(self) -> dict[str, float]:
        """Of a mixture: every source's part of the tokens so far; of all: the rows that were skipped, and the reads
        that were tried again."""
        found: dict[str, float] = {}
        total = sum(self._tokens)
        if len(self._sources) > 1 and total:
            found = {f"mixture/{name}": tokens / total for name, tokens in zip(self._names, self._tokens, strict=True)}
        if skipped := sum(source.bad.count for source in self._sources):
            found["data/skipped"] = float(skipped)
        if retries := sum(source.num_retries for source in self._sources):
            found["data/retries"] = float(retries)
        return found

    def state(self) -> dict[str, Any]:
        """Where it stands: numbers and text, for a checkpoint."""
        return {"tokens": list(self._tokens), "sources": [source.state() for source in self._sources]}

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["sources"]) != len(self._sources):
            raise DataError(
                f"the data has {len(self._sources)} sources and had {len(state['sources'])} when its place was saved: "
                "give it the mixture it was started with"
            )
        self._tokens = list(state["tokens"])
        for source, its_state in zip(self._sources, state["sources"], strict=True):
            source.restore(its_state)


def _unique(names: list[str]) -> list[str]:
    return [f"{name}#{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]

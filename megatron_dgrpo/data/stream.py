"""Rows that are read as they are needed, from files or from the hub, without end.

Rows are shuffled in blocks: so many are read, and given out in an order that depends on (seed, epoch, block) alone.
Where the stream stands is then a block's beginning, which the library `datasets` can say and go back to, and a place in
the block. So a block whose reading fails is read again from there; an epoch that ends before the one before it did has
failed, too.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from megatron_dgrpo.config.data import Source
from megatron_dgrpo.data.bad_rows import BadRows
from megatron_dgrpo.data.patience import EndedEarly, Patience
from megatron_dgrpo.data.rows import PromptRow, make_row, row_problems
from megatron_dgrpo.data.shuffle import shuffled
from megatron_dgrpo.data.table import check_columns, open_dataset
from megatron_dgrpo.errors import DataError


class Stream:
    """Rows without a problem, one after another; what became of the others is in `bad`."""

    def __init__(self, source: Source, *, seed: int, index: int = 0, needs_answer: bool = False) -> None:
        self._source, self._seed, self._index, self._needs_answer = source, seed, index, needs_answer
        self.bad = BadRows(source.where)
        self._patience = Patience(source)
        self._count = 0  # of this epoch's rows, before the block
        self._expected: int | None = None  # in an epoch, once one has ended
        self._epoch = self._block = self._place = 0
        self._restart()

    @property
    def num_retries(self) -> int:
        return self._patience.num_retries

    def draw(self) -> PromptRow:
        while True:
            if self._place == len(self._rows):
                self._next_block()
            number, row = self._rows[int(self._order[self._place])]
            self._place += 1
            if problems := row_problems(self._source, row, needs_answer=self._needs_answer):
                self.bad.add(number, problems)
                if self._source.on_bad_row == "error":
                    self.bad.refuse("one with text in its fields")
                continue
            self.bad.num_good += 1
            made = make_row(self._source, number, row)
            return replace(made, name=f"{made.name}@{self._epoch}")

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "block": self._block,
            "place": self._place,
            "begin": self._begin,
            "good": self.bad.num_good,
            "count": self._count,
            "expected": self._expected,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._block, self._begin = state["epoch"], state["block"], state["begin"]
        self._count, self._expected = state["count"], state["expected"]
        self._reopen()
        self._read(self._block)
        self._place, self.bad.num_good = state["place"], state["good"]

    def _reopen(self) -> None:
        """At the beginning of the block."""
        self._dataset = open_dataset(self._source, streaming=True)
        self._dataset.load_state_dict(self._begin)
        self._iterator = iter(self._dataset)

    def _restart(self) -> None:
        def open_it() -> None:
            self._dataset = open_dataset(self._source, streaming=True)

        # what is wrong with it at the start is said at once; later it was right before
        open_it() if self._expected is None else self._patience(open_it)
        check_columns(self._source, self._dataset.column_names)
        self._iterator = iter(self._dataset)
        self._block = self._place = self._count = 0
        self._begin = self._dataset.state_dict()
        self._read(0)

    def _next_block(self) -> None:
        self._begin = self._dataset.state_dict()
        self._count += len(self._rows)
        self._block, self._place = self._block + 1, 0
        if not self._read(self._block):
            if not self.bad.num_good:
                raise DataError(f"{self._source.where} has no row that can be used; {self.bad.summary()}")
            self._epoch += 1
            self._expected = self._count
            self._restart()

    def _read(self, block: int) -> bool:
        """The rows of a block with their numbers; False where there are none any more."""
        size = self._source.shuffle_buffer

        def read() -> list[Any]:
            rows = list(itertools.islice(self._iterator, size))
            total = self._count + len(rows)
            if len(rows) < size and self._expected is not None and total < self._expected:
                raise EndedEarly(f"it ended after {total} rows, and had {self._expected} in the epoch before")
            return rows

        found = self._patience(read, self._reopen)
        self._rows = list(enumerate(found, block * size + 1))
        self._order = shuffled(len(found), self._seed, self._epoch, self._index, block + 1)
        if not found and block == 0:
            raise DataError(f"{self._source.where} is empty: it gives no row")
        return bool(found)

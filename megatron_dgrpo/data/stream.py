"""Rows that are read as they are needed, from files or from the hub, without end.

Rows are shuffled in blocks: so many are read, and given out in an order that depends on (seed, epoch, block) alone.
Where the stream stands is then a block's beginning, which the library `datasets` can say and go back to, and a place in
the block.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from megatron_dgrpo.config.data import Source
from megatron_dgrpo.data.bad_rows import BadRows
from megatron_dgrpo.data.rows import PromptRow, make_row, row_problems
from megatron_dgrpo.data.shuffle import shuffled
from megatron_dgrpo.data.table import check_columns, open_dataset
from megatron_dgrpo.errors import DataError


class Stream:
    """Rows without a problem, one after another; what became of the others is in `bad`."""

    def __init__(self, source: Source, *, seed: int, index: int = 0, needs_answer: bool = False) -> None:
        self._source, self._seed, self._index, self._needs_answer = source, seed, index, needs_answer
        self.bad = BadRows(source.where)
        self._epoch = self._block = self._place = 0
        self._restart()

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
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._block = state["epoch"], state["block"]
        self._dataset = open_dataset(self._source, streaming=True)
        self._dataset.load_state_dict(state["begin"])
        self._iterator = iter(self._dataset)
        self._begin = state["begin"]
        self._read(self._block)
        self._place, self.bad.num_good = state["place"], state["good"]

    def _restart(self) -> None:
        self._dataset = open_dataset(self._source, streaming=True)
        check_columns(self._source, self._dataset.column_names)
        self._iterator = iter(self._dataset)
        self._block = self._place = 0
        self._begin = self._dataset.state_dict()
        self._read(0)

    def _next_block(self) -> None:
        self._begin = self._dataset.state_dict()
        self._block, self._place = self._block + 1, 0
        if not self._read(self._block):
            if not self.bad.num_good:
                raise DataError(f"{self._source.where} has no row that can be used; {self.bad.summary()}")
            self._epoch += 1
            self._restart()

    def _read(self, block: int) -> bool:
        """The rows of a block with their numbers; False where there are none any more."""
        size = self._source.shuffle_buffer
        found = list(itertools.islice(self._iterator, size))
        self._rows = list(enumerate(found, block * size + 1))
        self._order = shuffled(len(found), self._seed, self._epoch, self._index, block + 1)
        if not found and block == 0:
            raise DataError(f"{self._source.where} is empty: it gives no row")
        return bool(found)

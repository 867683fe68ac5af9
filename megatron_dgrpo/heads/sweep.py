"""Walking over rows x vocabulary: chunks of rows, tiles of columns, and the logits of one tile at a time.

The buffers here are all the memory that depends on the vocabulary, and they have a fixed size. Rows are the outer loop,
so that what accumulates over the vocabulary (a row's hidden gradient) is complete when a chunk is left, and is never
held in float32 for all rows.

With `keep` the logits of the one chunk that the sweep then has are made once and stay for a second walk over it.

Legend: _T rows, _C rows of a chunk, _V columns of a tile, _H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dgrpo.heads import products
from megatron_dgrpo.heads.shard import Pair, Side

Scratch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """Sizes of chunks and tiles."""

    chunk_rows: int
    tile: int

    @classmethod
    def recompute(cls, pair: Pair, chunk_rows: int | None, tile: int | None) -> Plan:
        """Large enough for matrix products at full rate; on CPU small enough for a tile to stay in the cache."""
        return cls(chunk_rows or (4096 if pair.device.type == "cuda" else 512), tile or _even_tile(pair))

    @classmethod
    def keep(cls, pair: Pair, chunk_rows: int | None, tile: int | None) -> Plan:
        """As many rows as keep both models' logits within a budget, in whole blocks.

        Chunks are where ranks meet, so this looks only at what they have in common: not at their valid ids.
        """
        columns = pair.student.head.weight_VH.shape[0] * (1 if pair.teacher is None else 2)
        budget, block = (2**31, 256) if pair.device.type == "cuda" else (2**26, 64)
        rows = budget // (max(1, columns) * pair.dtype.itemsize) // block * block
        return cls(chunk_rows or min(4096, max(block, rows)), tile or _even_tile(pair))


def _even_tile(pair: Pair) -> int:
    """Tiles of about equal size, in whole blocks of columns: a small last one would be slow."""
    most, block = (8192, 128) if pair.device.type == "cuda" else (1024, 16)
    columns = max(1, pair.student.head.num_valid)
    parts = -(-columns // most)
    return -(-columns // (parts * block)) * block


@dataclass(frozen=True)
class Span:
    """Rows of a chunk or columns of a tile."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


def spans(start: int, stop: int, size: int) -> Iterator[Span]:
    for at in range(start, stop, size):
        yield Span(at, min(at + size, stop))


class Workspace:
    """Buffers that are made once and used again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = rows * columns
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self._flat[name][:size].view(rows, columns)


class Sweep:
    """Logits over the temperature of any chunk and tile of a pair of heads."""

    def __init__(
        self, pair: Pair, temperature: float, plan: Plan, workspace: Workspace | None = None, keep: bool = False
    ) -> None:
        assert not keep or pair.num_rows <= plan.chunk_rows
        self.pair, self.scale, self.plan, self.keep = pair, 1.0 / temperature, plan, keep
        self.workspace = workspace or Workspace(pair.device)
        self._kept = Chunk(self, Span(0, pair.num_rows)) if keep else None

    def chunks(self) -> Iterator[Chunk]:
        if self._kept is not None:
            yield self._kept
            return
        for rows in spans(0, self.pair.num_rows, self.plan.chunk_rows):
            yield Chunk(self, rows)

    def shared_tiles(self) -> Iterator[Span]:
        return spans(0, self.pair.num_shared, self.plan.tile)

    def student_only_tiles(self) -> Iterator[Span]:
        return spans(self.pair.num_shared, self.pair.student.head.num_valid, self.plan.tile)

    def beyond_tiles(self) -> Iterator[Span]:
        return spans(0, 0 if self.pair.teacher is None else self.pair.teacher.num_beyond, self.plan.tile)

    def scratch(self, like_CV: Tensor) -> Scratch:
        """Two tensors of a tile's size, for element-wise work."""
        rows, columns = like_CV.shape
        one, two = (self.workspace.get(name, rows, columns, like_CV.dtype) for name in ("one", "two"))
        return one, two


class Chunk:
    """Some rows. Hidden states are brought to the products' type once."""

    def __init__(self, sweep: Sweep, rows: Span) -> None:
        self.sweep, self.rows = sweep, rows
        self._hidden: dict[str, Tensor] = {}
        self._made: set[tuple[str, int]] = set()

    def student_hidden(self) -> Tensor:
        return self._operand("student", self.sweep.pair.student)

    def student_logits(self, columns: Span) -> Tensor:
        student = self.sweep.pair.student
        return self._logits("student", student, student.head.weight_VH, columns, student.head.num_valid)

    def teacher_logits(self, columns: Span) -> Tensor:
        teacher = self.sweep.pair.teacher
        assert teacher is not None
        return self._logits("teacher", teacher, teacher.head.weight_VH, columns, self.sweep.pair.num_shared)

    def beyond_logits(self, columns: Span) -> Tensor:
        teacher = self.sweep.pair.teacher
        assert teacher is not None and teacher.head.beyond_VH is not None
        out_CV = self.sweep.workspace.get("beyond", self.rows.size, columns.size, self.sweep.pair.dtype)
        return self._product(out_CV, "teacher", teacher, teacher.head.beyond_VH, columns)

    def _operand(self, whose: str, side: Side) -> Tensor:
        if whose not in self._hidden:
            self._hidden[whose] = products.operand(side.hidden_TH[self.rows.slice], self.sweep.pair.dtype)
        return self._hidden[whose]

    def _logits(self, whose: str, side: Side, weight_VH: Tensor, columns: Span, all_columns: int) -> Tensor:
        get, dtype = self.sweep.workspace.get, self.sweep.pair.dtype
        if not self.sweep.keep:
            return self._product(get(whose, self.rows.size, columns.size, dtype), whose, side, weight_VH, columns)
        kept = get(whose, all_columns, self.rows.size, dtype)  # tile after tile, each contiguous
        out_CV = kept[columns.slice].view(self.rows.size, columns.size)
        if (whose, columns.start) not in self._made:
            self._made.add((whose, columns.start))
            self._product(out_CV, whose, side, weight_VH, columns)
        return out_CV

    def _product(self, out_CV: Tensor, whose: str, side: Side, weight_VH: Tensor, columns: Span) -> Tensor:
        return products.logits(out_CV, self._operand(whose, side), weight_VH[columns.slice], self.sweep.scale)

"""From the boxes that ranks hold to files that are written block by block.

Every file has one writer: bytes that interleave from several nodes are what network filesystems are worst at. Files
are spread over the ranks. A block is some rows of one tensor: its writer takes the parts that it holds itself from
the live parameters, receives the others, and hands them to a thread that writes.

All ranks walk through the same blocks in the same order, so each send meets its receive; files that are written at
the same time take turns, block by block. Nothing here knows of layouts: who holds what is asked of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.hf.file_writer import BLOCK_BYTES, FileWriter
from megatron_dgrpo.checkpoint.hf.output_files import OutputFile
from megatron_dgrpo.checkpoint.hf.shards import WeightShard, WeightSpec
from megatron_dgrpo.parallel import platform

Box = tuple[tuple[int, int], ...]


class _Block(NamedTuple):
    """Rows `first` to `last` of a tensor."""

    file: int
    place: int
    first: int
    last: int


class _Piece(NamedTuple):
    """What of a block one rank holds: rows `first` to `last`, some columns."""

    owner: int
    box: Box
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.last - self.first, *(stop - start for start, stop in self.box[1:]))


class Collection:
    """One export on one rank. Its `writer` is to be waited for after each round, and closed."""

    def __init__(
        self,
        shards: Iterable[WeightShard],
        specs: list[WeightSpec],
        files: list[OutputFile],
        folder: Path,
        *,
        group: dist.ProcessGroup,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._group, self._rank, self._advance = group, dist.get_rank(group), advance
        self._specs, self._files, self._paths = specs, files, [folder / file.name for file in files]
        places = {spec.hf_name: place for place, spec in enumerate(specs)}
        self._mine = {(places[shard.hf_name], shard.box): shard.local_tensor for shard in shards}
        self._owners = self._share()
        self._writers = self._choose_writers()
        self.writer = FileWriter()

    def rounds(self) -> Iterator[list[int]]:
        """Files that are written at the same time: each has another writer."""
        together: list[int] = []
        for file, writer in enumerate(self._writers):
            if writer in [self._writers[other] for other in together]:
                yield together
                together = []
            together.append(file)
        yield together

    def collect(self, files: list[int]) -> None:
        """Hand all blocks of these files to their writers' threads."""
        blocks = [list(self._blocks(file)) for file in files]
        mine = [file for file in files if self._writers[file] == self._rank]
        for file in mine:
            self.writer.create(self._paths[file], self._files[file].size, self._files[file].header)
        for turn in range(max(map(len, blocks))):
            for block in (of_file[turn] for of_file in blocks if turn < len(of_file)):
                self._collect(block)
        for file in mine:
            self.writer.finish(self._paths[file])

    def _share(self) -> list[list[tuple[int, Box]]]:
        """Who holds which boxes of each tensor, for all tensors on all ranks."""
        everyone: list[list[tuple[int, Box]]] = [[]] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, list(self._mine), group=self._group)
        owners: list[list[tuple[int, Box]]] = [[] for _ in self._specs]
        for rank, boxes in enumerate(everyone):
            for place, box in boxes:
                owners[place].append((rank, box))
        for spec, found in zip(self._specs, owners, strict=True):
            held = sum(_count(box) for _, box in found)
            assert held == math.prod(spec.global_shape), f"the ranks' boxes of {spec.hf_name} don't make the whole"
        return owners

    def _choose_writers(self) -> list[int]:
        """A file is written by one of the ranks that hold most of it; these take turns."""
        writers: list[int] = []
        for number, file in enumerate(self._files):
            held: dict[int, int] = {}
            for place in file.tensors:
                for rank, box in self._owners[place]:
                    held[rank] = held.get(rank, 0) + _count(box)
            best = sorted(rank for rank, count in held.items() if count > 0.9 * max(held.values()))
            writers.append(best[number % len(best)])
        return writers

    def _blocks(self, file: int) -> Iterator[_Block]:
        for place in self._files[file].tensors:
            spec = self._specs[place]
            step = max(1, BLOCK_BYTES // self._row_bytes(spec))
            for first in range(0, spec.global_shape[0], step):
                yield _Block(file, place, first, min(first + step, spec.global_shape[0]))

    def _row_bytes(self, spec: WeightSpec) -> int:
        return math.prod(spec.global_shape[1:]) * spec.dtype.itemsize

    def _collect(self, block: _Block) -> None:
        spec, writer = self._specs[block.place], self._writers[block.file]
        whole_rows = tuple((0, size) for size in spec.global_shape[1:])
        in_columns = []
        for owner, box in self._owners[block.place]:
            piece = _Piece(owner, box, max(block.first, box[0][0]), min(block.last, box[0][1]))
            if piece.first >= piece.last or self._rank not in (owner, writer):
                continue
            if self._rank != writer:
                part = self._local(block, piece).to(spec.dtype).contiguous()
                dist.send(part, group=self._group, group_dst=writer)
            elif box[1:] == whole_rows:
                self._write_rows(block, piece)
            else:
                in_columns.append(piece)
        if in_columns:
            self._write_assembled(block, in_columns)
        if self._advance is not None:
            self._advance((block.last - block.first) * self._row_bytes(spec))

    def _write_rows(self, block: _Block, piece: _Piece) -> None:
        """A piece of whole rows lies in one run in the file; what can be written as it is, is."""
        spec, path = self._specs[block.place], self._paths[block.file]
        offset = self._files[block.file].starts[block.place] + piece.first * self._row_bytes(spec)
        if piece.owner == self._rank:
            part = self._local(block, piece)
            if part.device.type == "cpu" and part.dtype == spec.dtype and part.is_contiguous():
                self.writer.write(path, offset, part, is_buffer=False)
                return
        buffer = self.writer.buffer(piece.shape, spec.dtype)
        self._fetch(block, piece, buffer)
        self.writer.write(path, offset, buffer, is_buffer=True)

    def _write_assembled(self, block: _Block, pieces: list[_Piece]) -> None:
        """Columns of several ranks make the rows of a block."""
        spec = self._specs[block.place]
        rows = self.writer.buffer((block.last - block.first, *spec.global_shape[1:]), spec.dtype)
        for piece in pieces:
            columns = tuple(slice(*bounds) for bounds in piece.box[1:])
            self._fetch(block, piece, rows[(slice(piece.first - block.first, piece.last - block.first), *columns)])
        offset = self._files[block.file].starts[block.place] + block.first * self._row_bytes(spec)
        self.writer.write(self._paths[block.file], offset, rows, is_buffer=True)

    def _fetch(self, block: _Block, piece: _Piece, target: torch.Tensor) -> None:
        """Fill `target`, in the host's memory, from the live parameter or from another rank."""
        if piece.owner == self._rank:
            target.copy_(self._local(block, piece))
        elif target.is_contiguous() and platform.device().type == "cpu":
            dist.recv(target, group=self._group, group_src=piece.owner)
        else:
            received = torch.empty(piece.shape, dtype=target.dtype, device=platform.device())
            dist.recv(received, group=self._group, group_src=piece.owner)
            target.copy_(received)

    def _local(self, block: _Block, piece: _Piece) -> torch.Tensor:
        first = piece.box[0][0]
        return self._mine[block.place, piece.box][piece.first - first : piece.last - first]


def _count(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)

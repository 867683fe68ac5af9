"""A frozen teacher: no gradients, no optimizer state, weights straight from its folder, in a layout of its own.

Its ranks are the student's, some of them, or others. A rank may thus hold a part of the teacher (its layers), a part of
its head (the student's last stage, where the heads are), both or neither. The teacher's own last stage keeps no head:
nothing multiplies with it there.

Between uses its layers rest on the device or in pinned host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.importer import import_weights, read_head
from megatron_dgrpo.config.schema import RopeScaling
from megatron_dgrpo.heads import HeadShard, gather_rows
from megatron_dgrpo.model.decoder import Decoder, build_decoder
from megatron_dgrpo.model.flops import forward_cost
from megatron_dgrpo.model.layouts import padding_unit
from megatron_dgrpo.model.megatron_config import BuildOptions
from megatron_dgrpo.model.schedule import run_schedule
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trees import Tree
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Groups
from megatron_dgrpo.teacher.redistribution import redistribute
from megatron_dgrpo.teacher.rows import TeacherRows

Memory = Literal["device", "host"]


@dataclass(frozen=True)
class FrozenTeacher:
    spec: ModelSpec
    groups: Groups
    student_groups: Groups
    options: BuildOptions
    decoder: Decoder | None
    """This rank's part of the layers."""
    head: HeadShard | None
    """This rank's part of the head, cut at the student's vocabulary boundaries."""
    weights_in: Memory
    rows_in: Memory

    def rows(self, trees: Sequence[Tree], student_packing: Packing) -> TeacherRows | None:
        """Rows of the student's loss tokens, on the student's last stage. Every rank of the world calls it.

        `trees` are the whole batch, the same on all ranks, as is the way in which the student's ranks share it out.
        """
        return self.hand_over(self.score(trees, student_packing), trees, trees, student_packing)

    def score(self, mine: Sequence[Tree], student_packing: Packing) -> TeacherRows | None:
        """Rows of these trees where this model made them. Ranks without a part of it go on at once."""
        if self.decoder is None or not mine:
            return None
        return self._forward(mine, self._packing(student_packing.max_tokens))

    def hand_over(
        self, made: TeacherRows | None, mine: Sequence[Tree], trees: Sequence[Tree], student_packing: Packing
    ) -> TeacherRows | None:
        """What `score` made of `mine`, some of the batch's `trees`, to the student's last stage.

        Every rank of the world calls it, with or without rows. Where `mine` is empty nothing is sent.
        """
        spread, everyone = self.rows_in == "host", dist.group.WORLD
        assert everyone is not None
        rows = redistribute(
            made,
            mine,
            trees,
            teacher=self.groups.grid,
            student=self.student_groups.grid,
            teacher_packing=self._packing(student_packing.max_tokens),
            student_packing=student_packing,
            hidden_size=self.spec.hidden_size,
            dtype=self.options.dtype,
            spread=spread,
            group=everyone,
        )
        return rows.in_host_memory(self.student_groups.tp) if rows is not None and spread else rows

    def _packing(self, max_tokens: int) -> Packing:
        grid, options = self.groups.grid, self.options
        return Packing(
            max_tokens,
            dp=grid.dp,
            cp=grid.cp,
            multiple_of=padding_unit(tp=grid.tp, sequence_parallel=options.sequence_parallel, fp8=options.fp8),
            rounds_of=grid.pp if options.vpp > 1 else 1,
            cost=forward_cost(self.spec),
        )

    @torch.no_grad()
    def _forward(self, trees: Sequence[Tree], packing: Packing) -> TeacherRows | None:
        """Rows of this rank's share of the trees, on every tensor-parallel rank of the teacher's last stage."""
        assert self.decoder is not None
        grid, options, parts = self.groups.grid, self.options, []
        batches = packing.micro_batches(trees, rank=grid.coordinate("dp"), cp_rank=grid.coordinate("cp"))

        def keep(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, None]:
            where = hidden.device
            rows = gather_rows(
                hidden,
                torch.from_numpy(layout.row_hidden_R).to(where),
                group=self.groups.tp,
                sequence_parallel=options.sequence_parallel,
            )
            parts.append((torch.from_numpy(layout.row_stream_R).to(where), rows))
            return hidden.new_zeros(()), None

        with _on_device(self.decoder, self.weights_in):
            run_schedule(self.decoder, list(self.decoder.parts), batches, keep, forward_only=True)
        return TeacherRows.collect(parts) if grid.last_stage else None


def load_teacher(
    folder: str | Path,
    *,
    groups: Groups,
    options: BuildOptions,
    student_spec: ModelSpec,
    student_groups: Groups,
    rope: RopeScaling | None = None,
    weights_in: Memory = "device",
    rows_in: Memory = "device",
) -> FrozenTeacher:
    """A teacher on the ranks of `groups`, its head on the last stage of `student_groups`. Every rank calls it."""
    spec = read_spec(folder, rope)
    decoder = _layers(spec, folder, groups, options, weights_in) if groups.member else None
    student, head = student_groups.grid, None
    if student.member and student.last_stage:
        head = _head(spec, folder, decoder, student_spec, student_groups, options.dtype, weights_in)
    return FrozenTeacher(spec, groups, student_groups, options, decoder, head, weights_in, rows_in)


def _layers(spec: ModelSpec, folder: str | Path, groups: Groups, options: BuildOptions, weights_in: Memory) -> Decoder:
    decoder = build_decoder(spec, groups=groups, options=options)
    if groups.grid.last_stage:
        decoder.parts[-1].output_layer.weight = None  # before anything is written to it
    import_weights(decoder, folder)
    if weights_in == "host" and torch.cuda.is_available():
        for parameter in decoder.parameters():
            parameter.data = parameter.data.cpu().pin_memory()
    return decoder.requires_grad_(False).eval()


@contextmanager
def _on_device(decoder: Decoder, weights_in: Memory) -> Iterator[None]:
    """The layers on the device, and afterwards where they rest. Nothing is written back: they do not change."""
    if weights_in == "device" or not torch.cuda.is_available():
        yield
        return
    resting = {parameter: parameter.data for parameter in decoder.parameters()}
    for parameter, data in resting.items():
        parameter.data = data.to(platform.device(), non_blocking=True)
    try:
        yield
    finally:
        for parameter, data in resting.items():
            parameter.data = data


def _head(
    spec: ModelSpec,
    folder: str | Path,
    decoder: Decoder | None,
    student_spec: ModelSpec,
    student_groups: Groups,
    dtype: torch.dtype,
    weights_in: Memory,
) -> HeadShard:
    """Cut at the student's vocabulary boundaries, whatever the teacher's own vocabulary's padding is.

    Where a tied teacher's embedding is on this rank, too, and one has all rows of the other, they are one tensor.
    """
    grid = student_groups.grid
    first, num_valid = student_spec.vocabulary_shard(grid.coordinate("tp"), grid.tp)
    start = min(first, spec.vocab_size)
    stop = max(start, min(first + num_valid, spec.vocab_size))
    last = grid.coordinate("tp") == grid.tp - 1
    first_beyond = min(student_spec.vocab_size, spec.vocab_size) if last else spec.vocab_size

    def read(begin: int, end: int) -> torch.Tensor:
        rows = torch.empty(end - begin, spec.hidden_size, dtype=dtype, device=platform.device())
        read_head(folder, spec, begin, rows)
        return rows

    on_device = weights_in == "device" or not torch.cuda.is_available()
    embedding = _tied_embedding(decoder) if on_device else None
    beyond = read(first_beyond, spec.vocab_size)
    if embedding is None:
        rows = read(start, stop)
    elif embedding.first <= start <= stop <= embedding.stop:
        rows = embedding.weight.detach()[start - embedding.first : stop - embedding.first]
    elif start <= embedding.first <= embedding.stop <= stop and len(embedding.weight) == embedding.num_rows:
        embedding.weight.data = embedding.weight.new_empty(0)  # before the head is there
        rows = read(start, stop)
        embedding.weight.data = rows[embedding.first - start : embedding.stop - start]
    else:
        rows = read(start, stop)
    return HeadShard(rows, first, stop - start, beyond if len(beyond) else None)


@dataclass(frozen=True)
class _Embedding:
    """A tied teacher's embedding on its first stage, which has rows of its head."""

    weight: torch.nn.Parameter
    first: int
    num_rows: int
    """Without those that pad the vocabulary."""

    @property
    def stop(self) -> int:
        return self.first + self.num_rows


def _tied_embedding(decoder: Decoder | None) -> _Embedding | None:
    if decoder is None or not decoder.spec.tied or not decoder.groups.grid.first_stage:
        return None
    grid = decoder.groups.grid
    shard = decoder.spec.vocabulary_shard(grid.coordinate("tp"), grid.tp)
    return _Embedding(decoder.parts[0].embedding.word_embeddings.weight, *shard)

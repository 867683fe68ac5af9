"""A frozen teacher on the student's ranks: no gradients, no optimizer state, weights straight from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.importer import import_weights, read_head
from megatron_dgrpo.heads import HeadShard, gather_rows
from megatron_dgrpo.model.decoder import Decoder, build_decoder
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Groups
from megatron_dgrpo.teacher.rows import TeacherRows


class FrozenTeacher:
    def __init__(self, decoder: Decoder, head: HeadShard) -> None:
        self.decoder, self.head = decoder.requires_grad_(False).eval(), head

    @torch.no_grad()
    def score(self, layouts: Sequence[Layout]) -> TeacherRows:
        """Hidden states of the layouts' loss rows, on every tensor-parallel rank."""
        where, parts = platform.device(), []
        for layout in layouts:
            hidden = self.decoder(layout)
            rows = gather_rows(
                hidden,
                torch.from_numpy(layout.row_hidden_R).to(where),
                group=self.decoder.groups.tp,
                sequence_parallel=self.decoder.config.sequence_parallel,
            )
            parts.append((torch.from_numpy(layout.row_stream_R).to(where), rows))
        return TeacherRows.collect(parts)


def load_teacher(
    folder: str | Path, student: Decoder, *, groups: Groups, dtype: torch.dtype, sequence_parallel: bool
) -> FrozenTeacher:
    """A teacher whose head is cut at the student's vocabulary boundaries, whatever its own vocabulary's padding is."""
    spec, boundaries = read_spec(folder), student.head()
    decoder = build_decoder(spec, groups=groups, dtype=dtype, sequence_parallel=sequence_parallel)
    import_weights(decoder, folder)
    start = min(boundaries.start, spec.vocab_size)
    stop = max(start, min(start + boundaries.num_valid, spec.vocab_size))
    last = groups.grid.coordinate("tp") == groups.grid.tp - 1
    first_beyond = min(student.spec.vocab_size, spec.vocab_size) if last else spec.vocab_size
    rows, beyond = (
        read_head(folder, spec, first, end, dtype).to(platform.device())
        for first, end in ((start, stop), (first_beyond, spec.vocab_size))
    )
    return FrozenTeacher(decoder, HeadShard(rows, boundaries.start, stop - start, beyond if len(beyond) else None))

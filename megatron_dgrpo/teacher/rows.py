"""What a teacher hands over: final hidden states of loss rows, keyed by stream index. Never logits.

Legend: M rows that this rank holds, R rows of one of the student's micro-batches, H the teacher's hidden size.

The key is the stream index and nothing else, because nothing else is shared: a teacher packs its own micro-batches, may
have another layout, and may see another prompt than the student.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TeacherRows:
    stream_M: torch.Tensor  # int64, ascending
    hidden_MH: torch.Tensor

    @classmethod
    def collect(cls, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> TeacherRows:
        """From (stream indices, hidden states) of some micro-batches."""
        stream_M = torch.cat([stream for stream, _ in parts])
        order_M = stream_M.argsort()
        return cls(stream_M[order_M], torch.cat([hidden for _, hidden in parts])[order_M])

    def select(self, stream_R: torch.Tensor) -> torch.Tensor:
        """Hidden states of some loss tokens, in their order."""
        place_R = torch.searchsorted(self.stream_M, stream_R)
        found = place_R < len(self.stream_M)
        assert bool(found.all()) and bool((self.stream_M[place_R] == stream_R).all()), "a loss row without teacher row"
        return self.hidden_MH[place_R]

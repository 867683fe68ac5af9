"""What a teacher hands over: final hidden states of loss rows, keyed by stream index. Never logits.

Legend: M rows that this rank holds, R rows of one of the student's micro-batches, H the teacher's hidden size.

The key is the stream index and nothing else, because nothing else is shared: a teacher packs its own micro-batches, may
have another layout, and may see another prompt than the student.

Rows rest on the device of every tensor-parallel rank of the student's last stage, or in those ranks' host memory, each
with its part of them. The parts of a micro-batch's rows are put together when its turn comes, over the tensor-parallel
group that runs the heads and in the same place: every rank of it is at the same micro-batch then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TeacherRows:
    stream_M: torch.Tensor  # int64, ascending
    hidden_MH: torch.Tensor
    spread_over: dist.ProcessGroup | None = None
    """The ranks that have the rows together; None: this rank has all that it needs."""

    @classmethod
    def collect(cls, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> TeacherRows:
        """From (stream indices, hidden states) of some micro-batches."""
        stream_M = torch.cat([stream for stream, _ in parts])
        order_M = stream_M.argsort()
        return cls(stream_M[order_M], torch.cat([hidden for _, hidden in parts])[order_M])

    def in_host_memory(self, spread_over: dist.ProcessGroup) -> TeacherRows:
        """The same rows as this rank's part of them, in memory that a device copies from fast."""
        hidden_MH = self.hidden_MH.cpu()
        if torch.cuda.is_available():
            hidden_MH = hidden_MH.pin_memory()
        return TeacherRows(self.stream_M.cpu(), hidden_MH, spread_over)

    def select(self, stream_R: torch.Tensor) -> torch.Tensor:
        """Hidden states of some loss tokens, in their order, where `stream_R` is."""
        wanted_R = stream_R.to(self.stream_M.device)
        if len(self.stream_M):
            place_R = torch.searchsorted(self.stream_M, wanted_R).clamp_max(len(self.stream_M) - 1)
            found_R = self.stream_M[place_R] == wanted_R
        else:
            place_R, found_R = wanted_R, torch.zeros_like(wanted_R, dtype=torch.bool)
        if self.spread_over is None:
            assert bool(found_R.all()), "a loss row without teacher row"
            return self.hidden_MH[place_R].to(stream_R.device)
        mine_RH = self.hidden_MH.new_zeros(len(wanted_R), self.hidden_MH.shape[1])
        mine_RH[found_R] = self.hidden_MH[place_R[found_R]]
        rows_RH = mine_RH.to(stream_R.device)
        dist.all_reduce(rows_RH, group=self.spread_over)  # each row is on one rank, and zero on the others
        return rows_RH

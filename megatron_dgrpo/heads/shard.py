"""A vocabulary-parallel head, and how the student's and the teacher's vocabularies meet on one rank.

Legend: _T rows, _V rows of a head on this rank, _H hidden size.

Both heads are cut at the student's boundaries: on each rank, row i of either head is vocabulary id `start + i`. Heads
of one tokenizer may still end at different ids, so a rank's ids fall into three runs:

    shared         both models have the id
    student only   beyond the teacher's vocabulary: in the student's log-probs and entropy, not in the divergences
    teacher only   beyond the student's (`beyond_VH`): only weighed, as the teacher's mass that is removed

Divergences are between both distributions restricted to the shared ids and renormalised. Padding rows are never
multiplied: a run ends before them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dgrpo.errors import ObjectiveError, listing


@dataclass(frozen=True)
class HeadShard:
    """One rank's part of a head."""

    weight_VH: Tensor
    """Rows of ids `start`, `start + 1`, ...; padding rows may follow. A student's has as many rows on every rank."""
    start: int
    """Id of the first row."""
    num_valid: int
    """Leading rows that are ids of the vocabulary; 0 on a shard that is all padding."""
    beyond_VH: Tensor | None = None
    """A teacher's rows for ids that the student does not have, each on one rank, whichever; for `removed_mass`."""

    def problems(self, whose: str) -> list[str]:
        found = []
        if self.weight_VH.dim() != 2:
            found.append(f"the {whose}'s head has shape {tuple(self.weight_VH.shape)}: give it as [rows, hidden size]")
        elif not 0 <= self.num_valid <= self.weight_VH.shape[0]:
            found.append(
                f"the {whose}'s head says {self.num_valid} valid rows of {self.weight_VH.shape[0]}: count the rows on"
                " this rank that are vocabulary ids"
            )
        if self.start < 0:
            found.append(f"the {whose}'s head starts at id {self.start}: the first id is 0")
        if self.beyond_VH is not None and self.beyond_VH.shape[1:] != self.weight_VH.shape[1:]:
            found.append(f"the {whose}'s rows beyond the vocabulary have another hidden size than its head")
        return found


@dataclass(frozen=True)
class Side:
    """One model's rows and head."""

    hidden_TH: Tensor
    head: HeadShard

    @property
    def num_beyond(self) -> int:
        return 0 if self.head.beyond_VH is None else self.head.beyond_VH.shape[0]

    def problems(self, whose: str) -> list[str]:
        hidden, weight = self.hidden_TH, self.head.weight_VH
        found = self.head.problems(whose)
        if hidden.dim() != 2:
            found.append(f"the {whose}'s rows have shape {tuple(hidden.shape)}: give them as [rows, hidden size]")
        elif weight.dim() == 2 and hidden.shape[1] != weight.shape[1]:
            found.append(f"the {whose}'s hidden states have size {hidden.shape[1]}, its head has {weight.shape[1]}")
        if hidden.dtype != weight.dtype:
            found.append(f"the {whose}'s hidden states are {hidden.dtype}, its head is {weight.dtype}: use one type")
        return found


@dataclass(frozen=True)
class Pair:
    """Student and, where there is one, teacher on this rank."""

    student: Side
    teacher: Side | None

    @property
    def num_rows(self) -> int:
        return self.student.hidden_TH.shape[0]

    @property
    def num_shared(self) -> int:
        return (self.teacher or self.student).head.num_valid

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, statistics and sums: float64 for float64 hidden states, else float32."""
        return torch.float64 if self.student.hidden_TH.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return self.student.hidden_TH.device

    def rows(self, rows: slice) -> Pair:
        """Some of the rows."""
        cut = lambda side: replace(side, hidden_TH=side.hidden_TH[rows])  # noqa: E731
        return Pair(cut(self.student), None if self.teacher is None else cut(self.teacher))

    def check(self, targets_T: Tensor, temperature: float) -> None:
        """Everything that is wrong with the shapes and numbers at hand, at once. All ranks see the same."""
        found = self.student.problems("student")
        if not 0 < temperature < float("inf"):
            found.append(f"the temperature is {temperature}: it divides both models' logits, and must be positive")
        if targets_T.shape != self.student.hidden_TH.shape[:1]:
            found.append(f"{targets_T.numel()} targets for {self.num_rows} rows: give one per row")
        if targets_T.is_floating_point():
            found.append(f"targets are {targets_T.dtype}: give integer ids")
        if self.teacher is not None:
            found += self.teacher.problems("teacher")
            if self.teacher.hidden_TH.shape[0] != self.num_rows:
                found.append(f"{self.teacher.hidden_TH.shape[0]} teacher rows for {self.num_rows} student rows")
            if self.teacher.head.start != self.student.head.start:
                found.append(
                    f"the teacher's head starts at id {self.teacher.head.start}, the student's at"
                    f" {self.student.head.start}: cut the teacher's at the student's boundaries"
                )
            if self.teacher.head.num_valid > self.student.head.num_valid:
                found.append(
                    f"the teacher's head has {self.teacher.head.num_valid} ids where the student's has"
                    f" {self.student.head.num_valid}: give ids that the student does not have as beyond_VH, on one rank"
                )
        if found:
            raise ObjectiveError(listing("The heads cannot be applied:", found))

"""The statistics that heads know, by name.

Divergences, the teacher's log-prob and everything top-k are over the ids that both models have, each distribution
renormalised on them; log-prob and entropy are over the student's whole vocabulary.

Legend: _T rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_dgrpo.errors import ObjectiveError, listing


@dataclass
class RowStatistics:
    """Per row, float32 (float64 for float64 inputs). What was not asked for is None; log-prob is always there."""

    logprob_T: Tensor
    """Of the target under the student."""
    entropy_T: Tensor | None = None
    """Of the student."""
    kl_T: Tensor | None = None
    """KL(student || teacher)."""
    forward_kl_T: Tensor | None = None
    """KL(teacher || student)."""
    jsd_T: Tensor | None = None
    """(1 - alpha) KL(student || M) + alpha KL(teacher || M), M = (1 - alpha) student + alpha teacher."""
    kl_topk_student_tail_T: Tensor | None = None
    """KL(student || teacher) of the student's k likeliest ids and one bucket for all others."""
    kl_topk_student_stopgrad_T: Tensor | None = None
    """Sum of p sg(log p - log q) over the student's k likeliest ids: the gradient is through the first p alone."""
    kl_topk_teacher_tail_T: Tensor | None = None
    """The same over the teacher's k likeliest ids, with the bucket."""
    kl_topk_teacher_stopgrad_T: Tensor | None = None
    """The same over the teacher's k likeliest ids, without."""
    teacher_logprob_T: Tensor | None = None
    """Of the target under the teacher; -inf for a target that the teacher does not have."""
    top1_agreement_T: Tensor | None = None
    """1 where both models' likeliest ids are the same, else 0. Of equally likely ids the lowest comes first."""
    topk_student_mass_T: Tensor | None = None
    """The student's mass on its own k likeliest ids."""
    topk_teacher_mass_T: Tensor | None = None
    """The teacher's mass on its own k likeliest ids."""
    topk_overlap_T: Tensor | None = None
    """Share of the student's k likeliest ids that are among the teacher's."""
    removed_mass_T: Tensor | None = None
    """The teacher's mass on ids that the student does not have, removed before it is renormalised."""
    outside_mass_T: Tensor | None = None
    """The student's mass on ids that the teacher does not have."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> RowStatistics:
        return cls(**{f"{name}_T": value for name, value in values.items()})


TOPK_DIVERGENCES = (
    "kl_topk_student_tail",
    "kl_topk_student_stopgrad",
    "kl_topk_teacher_tail",
    "kl_topk_teacher_stopgrad",
)
TOPK_DIAGNOSTICS = ("topk_student_mass", "topk_teacher_mass", "topk_overlap")
MASSES = ("removed_mass", "outside_mass")
DIFFERENTIABLE = ("logprob", "entropy", "kl", "forward_kl", "jsd", *TOPK_DIVERGENCES)
NAMES = tuple(field.removesuffix("_T") for field in RowStatistics.__dataclass_fields__)
OF_TEACHER = tuple(name for name in NAMES if name not in ("logprob", "entropy"))


def outputs(want: Collection[str], has_teacher: bool) -> tuple[str, ...]:
    """Every name in `want`, log-prob, and with a teacher the masses outside the shared vocabulary."""
    found = [f"no statistic is called {name!r}: there are {', '.join(NAMES)}" for name in want if name not in NAMES]
    if not has_teacher:
        found += [f"{name!r} needs a teacher: give its hidden states and head" for name in want if name in OF_TEACHER]
    if found:
        raise ObjectiveError(listing("These statistics cannot be had:", found))
    asked = {"logprob", *want} | (set(MASSES) if has_teacher else set())
    return tuple(name for name in NAMES if name in asked)

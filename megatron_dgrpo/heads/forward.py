"""From hidden states to merged sums, and from these to statistics.

A NaN statistic is never silent: `Checks` says of every row whether either model's logits were finite and whether the
target was found on exactly one shard. They are formed from merged sums, so every rank of the group has the same and
raises, or does not, together with the others.

Legend: _T rows, _C rows of a chunk, _V columns of a tile.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.errors import NonFiniteError, ObjectiveError, listing
from megatron_dgrpo.heads import elementwise
from megatron_dgrpo.heads.logit_gradient import RowFacts
from megatron_dgrpo.heads.running import Running, merge
from megatron_dgrpo.heads.shard import Pair
from megatron_dgrpo.heads.sweep import Span, Sweep
from megatron_dgrpo.heads.topk import TopK


@dataclass
class Sums:
    """The merged state of the three runs of the vocabulary, and what belongs to the target."""

    shared: Running
    student_only: Running
    beyond: Running
    target_T: Tensor  # its logit
    found_T: Tensor  # on how many shards the target was found
    teacher_target_T: Tensor
    teacher_found_T: Tensor


def forward_sums(
    sweep: Sweep, targets_T: Tensor, names: Collection[str], topk: TopK | None, *, group: dist.ProcessGroup | None
) -> Sums:
    """One walk over all chunks and tiles, and one merge."""
    pair, teacher = sweep.pair, sweep.pair.teacher is not None
    own = {"m", "S"} | ({"U"} if "entropy" in names else set())
    both = own | ({"n", "St"} if teacher else set())
    both |= ({"D"} if "kl" in names else set()) | ({"F"} if "forward_kl" in names else set())
    shared = Running(both, pair.num_rows, pair.dtype, pair.device)
    student_only = Running(own if teacher else (), pair.num_rows, pair.dtype, pair.device)
    beyond = Running({"n", "St"} if teacher else (), pair.num_rows, pair.dtype, pair.device)
    target_KT = torch.zeros(4, pair.num_rows, dtype=pair.dtype, device=pair.device)
    for chunk in sweep.chunks():
        at = chunk.rows.slice
        local_C = targets_T[at] - pair.student.head.start
        for columns in sweep.shared_tiles():
            a_CV = chunk.student_logits(columns)
            b_CV = chunk.teacher_logits(columns) if teacher else None
            _pick(a_CV, local_C, columns, target_KT[:2, at])
            if b_CV is not None:
                _pick(b_CV, local_C, columns, target_KT[2:, at])
                if topk is not None:
                    topk.add_tile(chunk.rows, columns, a_CV, b_CV)
            elementwise.add_tile(shared.rows(at.start, at.stop), a_CV, b_CV, sweep.scratch(a_CV))
        for columns in sweep.student_only_tiles():
            a_CV = chunk.student_logits(columns)
            _pick(a_CV, local_C, columns, target_KT[:2, at])
            elementwise.add_tile(student_only.rows(at.start, at.stop), a_CV, None, sweep.scratch(a_CV))
        for columns in sweep.beyond_tiles():
            b_CV = chunk.beyond_logits(columns)
            elementwise.add_tile(beyond.rows(at.start, at.stop), None, b_CV, sweep.scratch(b_CV))
    target_KT = merge([shared, student_only, beyond], target_KT, group=group)
    return Sums(shared, student_only, beyond, *target_KT)


def _pick(logits_CV: Tensor, local_C: Tensor, columns: Span, value_and_found_2C: Tensor) -> None:
    """The target's logit, where it is in this tile."""
    value_C, found_C = value_and_found_2C
    inside_C = (local_C >= columns.start) & (local_C < columns.stop)
    column_C = (local_C - columns.start).clamp(0, columns.size - 1)
    picked_C = logits_CV.gather(1, column_C[:, None])[:, 0]
    value_C.copy_(torch.where(inside_C, picked_C, value_C))
    found_C.add_(inside_C)


@dataclass
class Checks:
    student_finite_T: Tensor
    teacher_finite_T: Tensor
    found_T: Tensor

    @classmethod
    def cat(cls, parts: list[Checks]) -> Checks:
        join = lambda name: torch.cat([getattr(part, name) for part in parts])  # noqa: E731
        return cls(join("student_finite_T"), join("teacher_finite_T"), join("found_T"))

    def raise_if_bad(self, targets_T: Tensor, pair: Pair) -> None:
        """Waits for the device, once."""
        if bool((self.student_finite_T & self.teacher_finite_T & self.found_T).all()):
            return
        problems = []
        for whose, finite_T in (("student", self.student_finite_T), ("teacher", self.teacher_finite_T)):
            side = pair.student if whose == "student" else pair.teacher
            rows_B = (~finite_T).nonzero()[:, 0]
            if side is not None and len(rows_B):
                clean = bool(torch.isfinite(side.hidden_TH[rows_B]).all())
                where = "head, or their product overflows" if clean else "hidden states"
                problems.append(f"the {whose}'s logits at rows {_some(rows_B.tolist())}: look at its {where}")
        if problems:
            raise NonFiniteError(listing("Logits are NaN or infinite:", problems))
        rows_B = (~self.found_T).nonzero()[:, 0]
        raise ObjectiveError(
            f"targets outside the student's vocabulary at rows {_some(rows_B.tolist())}: ids"
            f" {_some(targets_T[rows_B].tolist())}. Check that the tokenizer is the model's, and that the shards of the"
            " head cover its vocabulary once"
        )


def _some(items: list[int], limit: int = 8) -> str:
    return ", ".join(map(str, items[:limit])) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def finish(sums: Sums, names: Collection[str], has_teacher: bool) -> tuple[dict[str, Tensor], RowFacts, Checks]:
    """Statistics out of merged sums, what backward needs to know, and whether all is well."""
    values: dict[str, Tensor] = {}
    m_T, s_T, u_T = _whole_student(sums, has_teacher, values)
    log_s_T = s_T.log()
    found_T = sums.found_T == 1
    values["logprob"] = torch.where(found_T, sums.target_T - m_T - log_s_T, float("nan"))
    facts = RowFacts(lse_T=m_T + log_s_T)
    if u_T is not None:
        values["entropy"] = facts.entropy_T = log_s_T - u_T / s_T
    student_finite_T = torch.isfinite(s_T) & (s_T > 0)
    teacher_finite_T = torch.ones_like(student_finite_T)
    if has_teacher:
        shared = sums.shared
        facts.shared_lse_T = shared["m"] + shared["S"].log()
        facts.teacher_lse_T = _teacher(sums, names, values)
        facts.kl_T = values.get("kl")
        teacher_finite_T = torch.isfinite(shared["St"]) & (shared["St"] > 0)
    return values, facts, Checks(student_finite_T, teacher_finite_T, found_T)


def _whole_student(sums: Sums, has_teacher: bool, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Maximum, S and U over the shared and the student's own ids together."""
    shared, only = sums.shared, sums.student_only
    u_T = shared["U"] if "U" in shared.sums else None
    if not has_teacher:
        return shared["m"], shared["S"], u_T
    m_T = torch.maximum(shared["m"], only["m"])
    down_T, only_down_T = shared["m"] - m_T, only["m"] - m_T
    scale_T, only_scale_T = down_T.exp(), only_down_T.exp()
    only_s_T = only_scale_T * only["S"]
    s_T = scale_T * shared["S"] + only_s_T
    values["outside_mass"] = only_s_T / s_T
    if u_T is not None:
        u_T = scale_T * (u_T + shared["S"] * down_T) + only_scale_T * (only["U"] + only["S"] * only_down_T)
    return m_T, s_T, u_T


def _teacher(sums: Sums, names: Collection[str], values: dict[str, Tensor]) -> Tensor:
    """What involves the teacher; returns its log-sum-exp over the shared ids."""
    shared, beyond = sums.shared, sums.beyond
    log_s_T, log_st_T = shared["S"].log(), shared["St"].log()
    if "kl" in names:
        values["kl"] = shared["D"] / shared["S"] - log_s_T + log_st_T
    if "forward_kl" in names:
        values["forward_kl"] = shared["F"] / shared["St"] - log_st_T + log_s_T
    if "teacher_logprob" in names:
        logprob_T = sums.teacher_target_T - shared["n"] - log_st_T
        values["teacher_logprob"] = torch.where(sums.teacher_found_T == 1, logprob_T, float("-inf"))
    n_T = torch.maximum(shared["n"], beyond["n"])
    beyond_T = (beyond["n"] - n_T).exp() * beyond["St"]
    values["removed_mass"] = beyond_T / (beyond_T + (shared["n"] - n_T).exp() * shared["St"])
    return shared["n"] + log_st_T

"""d loss / d logits of a tile, for any upstream gradients of the statistics.

With l = log p and r = log q, p the student's and q the teacher's distribution, y the target and c the upstream
gradients,

    dL/da_v = c_lp [v = y] + p_v [-c_lp - c_H (l_v + H) + c_KL (l_v - r_v - KL) + c_FKL] - c_FKL q_v

where the divergences' p is P, restricted to the shared ids: P_v = p_v / w, w the student's mass on them. On a shared id
every p_v is written w P_v, with w <= 1, because 1 / w may overflow; on a student-only id the divergences add nothing.
Gathered per row, with k a number and e_v = P_v,

    dL/da_v = c_lp [v = y] + e_v [c_gap (a_v - b_v) + c_a a_v + k] - c_q q_v

a - b is taken first: near a good teacher it is small, and it must not be the difference of two large products. The JSD
adds a term to the bracket, top-k divergences a number to k and some entries beside the target's. The factor
1 / temperature that leads from a to hidden states and head is in every c.

Legend: _T rows, _C rows of a chunk, _V columns of a tile, _K entries of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dgrpo.heads.jsd import student_over_mixture
from megatron_dgrpo.heads.sweep import Scratch, Span


@dataclass
class RowFacts:
    """What is known of each row after the statistics. The teacher's are None where there is no teacher."""

    lse_T: Tensor  # log of the sum of e^a over the student's whole vocabulary
    entropy_T: Tensor | None = None
    shared_lse_T: Tensor | None = None
    teacher_lse_T: Tensor | None = None
    kl_T: Tensor | None = None
    jsd_student_T: Tensor | None = None  # KL(P || M)
    jsd_alpha: float = 0.5


@dataclass
class Slopes:
    """The numbers of the formula above, per row. None: zero for every row."""

    norm_T: Tensor  # e_v = exp(a_v - norm)
    k_T: Tensor
    by_logit_T: Tensor | None = None  # c_a
    by_gap_T: Tensor | None = None  # c_gap
    by_teacher_T: Tensor | None = None  # c_q
    by_jsd_T: Tensor | None = None  # of log(P / M)
    teacher_lse_T: Tensor | None = None
    jsd_alpha: float = 0.5

    @property
    def needs_teacher(self) -> bool:
        return any(x is not None for x in (self.by_gap_T, self.by_teacher_T, self.by_jsd_T))

    def rows(self, rows: slice) -> Slopes:
        cut: dict[str, Any] = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **cut)


def student_only_slopes(facts: RowFacts, upstream: Mapping[str, Tensor]) -> Slopes:
    """Log-prob and entropy, over the student's whole vocabulary."""
    k_T = torch.zeros_like(facts.lse_T)
    by_logit_T = None
    if "logprob" in upstream:
        k_T = k_T - upstream["logprob"]
    if "entropy" in upstream:
        assert facts.entropy_T is not None
        by_logit_T = -upstream["entropy"]
        k_T = k_T + by_logit_T * (facts.entropy_T - facts.lse_T)
    return Slopes(facts.lse_T, k_T, by_logit_T)


def shared_slopes(facts: RowFacts, upstream: Mapping[str, Tensor], topk_T: Tensor | None = None) -> Slopes:
    """On ids of both vocabularies (on all, without a teacher). `topk_T` multiplies P."""
    slopes = student_only_slopes(facts, upstream)
    if facts.shared_lse_T is None or facts.teacher_lse_T is None:
        return slopes
    share_T = (facts.shared_lse_T - facts.lse_T).exp()
    slopes.norm_T, slopes.teacher_lse_T = facts.shared_lse_T, facts.teacher_lse_T
    slopes.k_T = share_T * slopes.k_T
    if slopes.by_logit_T is not None:
        slopes.by_logit_T = share_T * slopes.by_logit_T
    if "kl" in upstream:
        assert facts.kl_T is not None
        slopes.by_gap_T = upstream["kl"]
        slopes.k_T = slopes.k_T + upstream["kl"] * (facts.teacher_lse_T - facts.shared_lse_T - facts.kl_T)
    if "forward_kl" in upstream:
        slopes.by_teacher_T = upstream["forward_kl"]
        slopes.k_T = slopes.k_T + upstream["forward_kl"]
    if "jsd" in upstream:
        assert facts.jsd_student_T is not None
        slopes.by_jsd_T, slopes.jsd_alpha = (1 - facts.jsd_alpha) * upstream["jsd"], facts.jsd_alpha
        slopes.k_T = slopes.k_T - slopes.by_jsd_T * facts.jsd_student_T
    if topk_T is not None:
        slopes.k_T = slopes.k_T + topk_T
    return slopes


def tile_gradient(a_CV: Tensor, b_CV: Tensor | None, slopes: Slopes, scratch: Scratch) -> Tensor:
    """dL/da of a tile but for the entries. Overwrites the logits; the result is one of them."""
    e_CV = torch.sub(a_CV, slopes.norm_T[:, None], out=scratch[0])
    jsd_CV = _jsd_bracket(e_CV, b_CV, slopes) if slopes.by_jsd_T is not None else None
    e_CV.exp_()
    if slopes.by_gap_T is not None:
        assert b_CV is not None
        a_CV.sub_(b_CV)
        if slopes.by_logit_T is None:
            a_CV.mul_(slopes.by_gap_T[:, None])
        else:  # c_gap (a - b) + c_a a = (c_gap + c_a) (a - b) + c_a b
            a_CV.mul_((slopes.by_gap_T + slopes.by_logit_T)[:, None])
            a_CV.add_(torch.mul(b_CV, slopes.by_logit_T[:, None], out=scratch[1]))
    elif slopes.by_logit_T is not None:
        a_CV.mul_(slopes.by_logit_T[:, None])
    if slopes.by_gap_T is None and slopes.by_logit_T is None:
        torch.mul(e_CV, slopes.k_T[:, None], out=a_CV)
    else:
        a_CV.add_(slopes.k_T[:, None]).mul_(e_CV)
    if jsd_CV is not None:
        a_CV.addcmul_(jsd_CV, e_CV)
    if slopes.by_teacher_T is not None:
        assert b_CV is not None and slopes.teacher_lse_T is not None
        b_CV.sub_(slopes.teacher_lse_T[:, None]).exp_()
        a_CV.sub_(b_CV.mul_(slopes.by_teacher_T[:, None]))
    return a_CV


def _jsd_bracket(logp_CV: Tensor, b_CV: Tensor | None, slopes: Slopes) -> Tensor:
    assert b_CV is not None and slopes.teacher_lse_T is not None and slopes.by_jsd_T is not None
    over_CV = student_over_mixture(logp_CV, b_CV - slopes.teacher_lse_T[:, None], slopes.jsd_alpha)
    return over_CV.mul_(slopes.by_jsd_T[:, None])


@dataclass
class Entries:
    """Gradients of single logits: the target's, and those of top-k ids."""

    id_TK: Tensor  # -1: none
    value_TK: Tensor

    @classmethod
    def of(cls, targets_T: Tensor, by_logprob_T: Tensor | None, more: list[tuple[Tensor, Tensor]]) -> Entries | None:
        if by_logprob_T is not None:
            more = [(targets_T[:, None], by_logprob_T[:, None]), *more]
        if not more:
            return None
        return cls(torch.cat([ids.long() for ids, _ in more], 1), torch.cat([values for _, values in more], 1))

    def tile(self, rows: Span, columns: Span, start: int) -> Entries:
        """Of some rows, with the column in this tile as the id; others than the tile's columns are not in it."""
        return Entries(self.id_TK[rows.slice] - (start + columns.start), self.value_TK[rows.slice])

    def add_to(self, grad_CV: Tensor) -> None:
        """To a tile, whose columns are the ids."""
        columns = grad_CV.shape[1]
        inside_CK = (self.id_TK >= 0) & (self.id_TK < columns)
        value_CK = torch.where(inside_CK, self.value_TK, 0.0)
        grad_CV.scatter_add_(1, self.id_TK.clamp(0, columns - 1), value_CK)

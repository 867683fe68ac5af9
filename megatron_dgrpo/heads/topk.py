"""The k likeliest ids of either model, with both models' logits there, and what is made of them.

With P, q the student's and the teacher's distribution over the shared ids, g = log P - log q, K the k ids, R_P and R_q
the masses on all other ids and R = log R_P - log R_q:

    tail         sum_K P g + R_P R     gradient to a_v:  P_v [(v in K) (g_v - R) + R - KL]
    stopgrad     sum_K P sg(g)         gradient to a_v:  P_v [(v in K) g_v - value]

The first is the KL of the distributions with the other ids as one bucket, never negative. The second is what is left of
the KL's gradient without the others. Both gradients are a number per row times P, which the tile's formula has room
for, and k entries. Where hardly anything is left of either bucket (`_FLOOR`) it is held constant: 1 - sum P is noise.

Of equal logits the lowest id is taken, whatever the tiles and shards.

Legend: _T rows, _C rows of a chunk, _V columns of a tile, _K likeliest ids, _N candidates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.heads.results import TOPK_DIAGNOSTICS, TOPK_DIVERGENCES
from megatron_dgrpo.heads.running import LOWEST
from megatron_dgrpo.heads.shard import Pair
from megatron_dgrpo.heads.sweep import Span

_FLOOR = {torch.float32: 1e-7, torch.float64: 1e-15}


@dataclass
class Likeliest:
    """One model's k likeliest ids; `other` is the other model's logit. A row with fewer ids has id -1 at the end."""

    logit_TK: Tensor
    other_TK: Tensor
    id_TK: Tensor

    @classmethod
    def none(cls, num_rows: int, k: int, like: Pair) -> Likeliest:
        lowest = torch.full((num_rows, k), LOWEST, dtype=like.dtype, device=like.device)
        return cls(lowest, lowest.clone(), torch.full((num_rows, k), -1, dtype=torch.int32, device=like.device))

    def rows(self, rows: slice) -> Likeliest:
        return Likeliest(self.logit_TK[rows], self.other_TK[rows], self.id_TK[rows])

    def take(self, logit_TN: Tensor, other_TN: Tensor, id_TN: Tensor) -> None:
        """The best of these candidates."""
        place_TK = lowest_of_largest(logit_TN, id_TN, self.id_TK.shape[1])
        for own, candidates in ((self.logit_TK, logit_TN), (self.other_TK, other_TN), (self.id_TK, id_TN)):
            own.copy_(candidates.gather(1, place_TK))


def lowest_of_largest(value_TN: Tensor, id_TN: Tensor, k: int) -> Tensor:
    """Places of the k largest values, equal ones by ascending id."""
    last_T1 = value_TN.topk(k, dim=1).values[:, -1:]
    rank_TN = torch.where(value_TN == last_T1, -id_TN.to(value_TN.dtype), float("-inf"))
    return rank_TN.masked_fill_(value_TN > last_T1, float("inf")).topk(k, dim=1).indices


@dataclass
class TopK:
    """Both models' k likeliest ids, as far as the statistics asked for need them."""

    names: frozenset[str]
    pair: Pair
    of: dict[str, Likeliest] = field(default_factory=dict)  # "student", "teacher"

    @classmethod
    def wanted(cls, names: Collection[str], k: int, pair: Pair) -> TopK | None:
        """None when nothing asked for is about likeliest ids. Agreement alone needs one id of each."""
        asked = frozenset(names) & {*TOPK_DIVERGENCES, *TOPK_DIAGNOSTICS, "top1_agreement"}
        if not asked:
            return None
        both = bool(asked & {"top1_agreement", "topk_overlap"})
        topk = cls(asked, pair)
        for model in ("student", "teacher"):
            if both or any(model in name for name in asked):
                topk.of[model] = Likeliest.none(pair.num_rows, k if asked - {"top1_agreement"} else 1, pair)
        return topk

    def add_tile(self, rows: Span, columns: Span, a_CV: Tensor, b_CV: Tensor) -> None:
        """Tiles come in ascending order of ids."""
        id_V = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=a_CV.device)
        for model, state in self.of.items():
            own_CV, other_CV = (a_CV, b_CV) if model == "student" else (b_CV, a_CV)
            now = state.rows(rows.slice)
            k = min(now.id_TK.shape[1], columns.size)
            place_CK = lowest_of_largest(own_CV, id_V, k)
            id_CK = id_V[place_CK] + self.pair.student.head.start
            now.take(
                torch.cat([now.logit_TK, own_CV.gather(1, place_CK)], 1),
                torch.cat([now.other_TK, other_CV.gather(1, place_CK)], 1),
                torch.cat([now.id_TK, id_CK], 1),
            )

    def merge(self, *, group: dist.ProcessGroup | None) -> None:
        """The best over all shards, likeliest first; one collective."""
        if group is not None and group.size() > 1 and self.pair.num_rows:
            own = [x for s in self.of.values() for x in (s.logit_TK, s.other_TK, s.id_TK.to(s.logit_TK.dtype))]
            mine = torch.stack(own)
            everyone = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(everyone, mine, group=group)
            for i, state in enumerate(self.of.values()):
                logit_TN, other_TN, id_TN = (torch.cat([x[3 * i + j] for x in everyone], 1) for j in range(3))
                state.take(logit_TN, other_TN, id_TN.to(torch.int32))
        for state in self.of.values():
            by_id_TK = state.id_TK.argsort(1)
            order_TK = by_id_TK.gather(
                1, state.logit_TK.gather(1, by_id_TK).argsort(dim=1, descending=True, stable=True)
            )
            for x_TK in (state.logit_TK, state.other_TK, state.id_TK):
                x_TK.copy_(x_TK.gather(1, order_TK))

    def finish(self, lse_T: Tensor, teacher_lse_T: Tensor, values: dict[str, Tensor]) -> TopKFacts:
        """The statistics, and what backward needs."""
        facts = TopKFacts()
        for model, state in self.of.items():
            student_TK, teacher_TK = state.logit_TK, state.other_TK
            if model == "teacher":
                student_TK, teacher_TK = teacher_TK, student_TK
            support = Support.of(state.id_TK, student_TK - lse_T[:, None], teacher_TK - teacher_lse_T[:, None])
            facts.supports[model] = support
            values[f"kl_topk_{model}_tail"] = support.tail_T
            values[f"kl_topk_{model}_stopgrad"] = support.stopgrad_T
            mass_TK = support.p_TK if model == "student" else support.q_TK
            values[f"topk_{model}_mass"] = mass_TK.sum(1)
        if self.of.keys() == {"student", "teacher"}:
            student_TK, teacher_TK = self.of["student"].id_TK, self.of["teacher"].id_TK
            values["top1_agreement"] = (student_TK[:, 0] == teacher_TK[:, 0]).to(lse_T.dtype)
            if "topk_overlap" in self.names:
                both_TN = torch.cat([student_TK, teacher_TK], 1).sort(1).values  # an id of both is there twice
                common_T = ((both_TN[:, 1:] == both_TN[:, :-1]) & (both_TN[:, 1:] >= 0)).sum(1)
                values["topk_overlap"] = common_T / (student_TK >= 0).sum(1).clamp(min=1).to(lse_T.dtype)
        return facts


@dataclass
class Support:
    """Values and slopes of both estimators on one model's k ids."""

    id_TK: Tensor
    p_TK: Tensor
    q_TK: Tensor
    gap_TK: Tensor  # log P - log q
    left_T: Tensor  # 1 where the bucket of all other ids is more than noise, else 0
    left_gap_T: Tensor  # R
    tail_T: Tensor
    stopgrad_T: Tensor

    @classmethod
    def of(cls, id_TK: Tensor, logp_TK: Tensor, logq_TK: Tensor) -> Support:
        valid_TK = id_TK >= 0
        p_TK, q_TK = (torch.where(valid_TK, x_TK.exp(), 0.0) for x_TK in (logp_TK, logq_TK))
        gap_TK = torch.where(valid_TK, logp_TK - logq_TK, 0.0)
        floor = _FLOOR[p_TK.dtype]
        left_p_T, left_q_T = 1 - p_TK.sum(1), 1 - q_TK.sum(1)
        left_T = (left_p_T > floor).to(p_TK.dtype)
        left_gap_T = left_p_T.clamp(min=floor).log() - left_q_T.clamp(min=floor).log()
        stopgrad_T = (p_TK * gap_TK).sum(1)
        tail_T = stopgrad_T + left_p_T.clamp(min=floor) * left_gap_T
        return cls(id_TK, p_TK, q_TK, gap_TK, left_T, left_gap_T, tail_T, stopgrad_T)


@dataclass
class TopKFacts:
    supports: dict[str, Support] = field(default_factory=dict)

    def gradient(self, upstream: Mapping[str, Tensor]) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """The number per row that multiplies P, and entries (ids, values)."""
        dense_T: Tensor | None = None
        entries = []
        for model, s in self.supports.items():
            for rest in ("tail", "stopgrad"):
                c_T = upstream.get(f"kl_topk_{model}_{rest}")
                if c_T is None:
                    continue
                if rest == "tail":
                    moved_T = s.left_T * (s.left_gap_T + 1)
                    own_TK = s.gap_TK + 1 - moved_T[:, None]
                    number_T = moved_T * s.p_TK.sum(1) - s.stopgrad_T - s.p_TK.sum(1)
                else:
                    own_TK, number_T = s.gap_TK, -s.stopgrad_T
                entries.append((s.id_TK, c_T[:, None] * s.p_TK * own_TK))
                dense_T = c_T * number_T if dense_T is None else dense_T + c_T * number_T
        return dense_T, entries

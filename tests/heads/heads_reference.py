"""Dense references: whole logits, plain autograd, no shards. Independent of megatron_dgrpo.heads.

Legend: _T rows, _V the student's vocabulary, _W the teacher's, _S ids of both, _H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dgrpo.heads import HeadShard

DIFFERENTIABLE = (
    "logprob",
    "entropy",
    "kl",
    "forward_kl",
    "jsd",
    "kl_topk_student_tail",
    "kl_topk_student_stopgrad",
    "kl_topk_teacher_tail",
    "kl_topk_teacher_stopgrad",
)
BASIC = ("logprob", "entropy", "kl", "forward_kl")


def dense(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    temperature: float,
    teacher_hidden_TH: Tensor | None = None,
    teacher_WH: Tensor | None = None,
    alpha: float = 0.5,
    k: int = 5,
) -> dict[str, Tensor]:
    """Every statistic by its definition."""
    logp_TV = torch.log_softmax(hidden_TH @ weight_VH.T / temperature, -1)
    out = {"logprob": logp_TV.gather(1, targets_T[:, None])[:, 0], "entropy": -(logp_TV.exp() * logp_TV).sum(1)}
    if teacher_hidden_TH is None or teacher_WH is None:
        return out
    shared = min(len(weight_VH), len(teacher_WH))
    logq_TW = torch.log_softmax(teacher_hidden_TH @ teacher_WH.T / temperature, -1)
    l_TS, r_TS = torch.log_softmax(logp_TV[:, :shared], -1), torch.log_softmax(logq_TW[:, :shared], -1)
    p_TS, q_TS = l_TS.exp(), r_TS.exp()
    out["kl"] = (p_TS * (l_TS - r_TS)).sum(1)
    out["forward_kl"] = (q_TS * (r_TS - l_TS)).sum(1)
    log_m_TS = ((1 - alpha) * p_TS + alpha * q_TS).log()
    out["jsd"] = (1 - alpha) * (p_TS * (l_TS - log_m_TS)).sum(1) + alpha * (q_TS * (r_TS - log_m_TS)).sum(1)
    out["teacher_logprob"] = torch.where(
        targets_T < shared, r_TS.gather(1, targets_T.clamp(max=shared - 1)[:, None])[:, 0], float("-inf")
    )
    out["removed_mass"] = logq_TW[:, shared:].exp().sum(1)
    out["outside_mass"] = logp_TV[:, shared:].exp().sum(1)
    tops = {}
    for model, own_TS in (("student", l_TS), ("teacher", r_TS)):
        top_TK = own_TS.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
        lk_TK, rk_TK = l_TS.gather(1, top_TK), r_TS.gather(1, top_TK)
        out[f"kl_topk_{model}_stopgrad"] = (lk_TK.exp() * (lk_TK - rk_TK).detach()).sum(1)
        rest = torch.ones_like(l_TS).scatter(1, top_TK, 0.0)
        left_p_T, left_q_T = (p_TS * rest).sum(1), (q_TS * rest).sum(1)
        tail_T = left_p_T * (left_p_T.log() - left_q_T.log())
        out[f"kl_topk_{model}_tail"] = (lk_TK.exp() * (lk_TK - rk_TK)).sum(1) + tail_T
        out[f"topk_{model}_mass"] = own_TS.gather(1, top_TK).exp().sum(1)
        tops[model] = top_TK
    out["topk_overlap"] = (tops["student"][:, :, None] == tops["teacher"][:, None, :]).any(2).to(l_TS.dtype).sum(1) / k
    out["top1_agreement"] = (tops["student"][:, 0] == tops["teacher"][:, 0]).to(l_TS.dtype)
    return {name: value.to(l_TS.dtype) for name, value in out.items()}


def student_shard(weight_VH: Tensor, rank: int, rows_per_rank: int) -> HeadShard:
    """Rows of one rank, a leaf, padded with rows that would be seen if they were ever used."""
    start = rank * rows_per_rank
    own_VH = weight_VH[start : start + rows_per_rank]
    padding_VH = weight_VH.new_full((rows_per_rank - len(own_VH), weight_VH.shape[1]), 7.0)
    return HeadShard(torch.cat([own_VH, padding_VH]).requires_grad_(), start, len(own_VH))


def teacher_shard(teacher_WH: Tensor, student: HeadShard, vocabulary: int, last: bool) -> HeadShard:
    """Cut at the student's boundaries; the ids beyond its vocabulary are on the last rank."""
    stop = max(student.start, min(student.start + student.num_valid, len(teacher_WH)))
    beyond = teacher_WH[vocabulary:] if last else None
    return HeadShard(teacher_WH[student.start : stop], student.start, stop - student.start, beyond)

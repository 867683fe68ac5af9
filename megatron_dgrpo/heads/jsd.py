"""Jensen-Shannon divergence between student and teacher, with weight alpha on the teacher.

    M = (1 - alpha) P + alpha q      JSD = (1 - alpha) KL(P || M) + alpha KL(q || M)
    dJSD/da_v = (1 - alpha) P_v [log(P_v / M_v) - KL(P || M)]

M needs both normalisers, so this is a second walk over the vocabulary after the statistics are merged, with a SUM of
its own. With d = log q - log P, log(P / M) = -log(1 + alpha (e^d - 1)), and log(q / M) = log(P / M) + d. For d > 0 the
roles are exchanged, so that no exponential overflows; near d = 0 neither form loses digits.

Legend: _T rows, _C rows of a chunk, _V columns of a tile.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.heads.running import row_dot
from megatron_dgrpo.heads.sweep import Sweep


def check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ObjectiveError(
            f"the JSD's alpha is {alpha}: its weight on the teacher lies between 0 and 1, and the JSD vanishes at"
            " either end. For KL(teacher || student) ask for 'forward_kl', for KL(student || teacher) for 'kl'"
        )


def student_over_mixture(logp_CV: Tensor, logq_CV: Tensor, alpha: float) -> Tensor:
    """log(P / M)."""
    d_CV = logq_CV - logp_CV
    weight_CV = (d_CV > 0).to(d_CV.dtype).mul_(1 - 2 * alpha).add_(alpha)  # 1 - alpha for d > 0, else alpha
    nearer_CV = -torch.log1p(weight_CV * torch.expm1(-d_CV.abs()))
    return nearer_CV - d_CV.clamp(min=0)


def jsd(
    sweep: Sweep, lse_T: Tensor, teacher_lse_T: Tensor, alpha: float, *, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The divergence and KL(P || M), per row."""
    sums_2T = torch.zeros(2, sweep.pair.num_rows, dtype=sweep.pair.dtype, device=sweep.pair.device)
    for chunk in sweep.chunks():
        at = chunk.rows.slice
        for columns in sweep.shared_tiles():
            logp_CV = chunk.student_logits(columns) - lse_T[at, None]
            logq_CV = chunk.teacher_logits(columns) - teacher_lse_T[at, None]
            over_CV = student_over_mixture(logp_CV, logq_CV, alpha)
            sums_2T[0, at] += row_dot(logp_CV.exp(), over_CV)
            sums_2T[1, at] += row_dot(logq_CV.exp(), over_CV.add_(logq_CV).sub_(logp_CV))
    if group is not None and group.size() > 1 and sums_2T.shape[1]:
        dist.all_reduce(sums_2T, group=group)
    return (1 - alpha) * sums_2T[0] + alpha * sums_2T[1], sums_2T[0]

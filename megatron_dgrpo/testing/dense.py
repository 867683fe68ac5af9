"""Row statistics from dense logits, by plain autograd: what the heads compute, for tests of what reads it.

Divergences are over the ids that both models have; log-prob and entropy over all of the student's.

Legend: _T rows, _TV rows x vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class DenseStatistics:
    logprob_T: torch.Tensor
    entropy_T: torch.Tensor
    kl_T: torch.Tensor  # KL(student || teacher)
    forward_kl_T: torch.Tensor
    jsd_T: torch.Tensor
    teacher_logprob_T: torch.Tensor
    teacher_entropy_T: torch.Tensor
    outside_mass_T: torch.Tensor  # the student's mass on ids that the teacher lacks

    @classmethod
    def of(
        cls,
        logits_TV: torch.Tensor,
        teacher_logits_TV: torch.Tensor,
        targets_T: torch.Tensor,
        *,
        temperature: float = 1.0,
        alpha: float = 0.5,
    ) -> DenseStatistics:
        l_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        shared = min(logits_TV.shape[-1], teacher_logits_TV.shape[-1])
        s_TV = torch.log_softmax(logits_TV[:, :shared] / temperature, dim=-1)
        r_TV = torch.log_softmax(teacher_logits_TV[:, :shared].detach() / temperature, dim=-1)
        p_TV, q_TV = s_TV.exp(), r_TV.exp()
        m_TV = ((1 - alpha) * p_TV + alpha * q_TV).log()
        pick = lambda x_TV: x_TV.gather(1, targets_T[:, None])[:, 0]  # noqa: E731
        lacking_TV = r_TV.new_full((len(r_TV), l_TV.shape[-1] - shared), -torch.inf)
        return cls(
            logprob_T=pick(l_TV),
            entropy_T=-(l_TV.exp() * l_TV).sum(-1),
            kl_T=(p_TV * (s_TV - r_TV)).sum(-1),
            forward_kl_T=(q_TV * (r_TV - s_TV)).sum(-1),
            jsd_T=(1 - alpha) * (p_TV * (s_TV - m_TV)).sum(-1) + alpha * (q_TV * (r_TV - m_TV)).sum(-1),
            teacher_logprob_T=pick(torch.cat([r_TV, lacking_TV], -1)),
            teacher_entropy_T=-(q_TV * r_TV).sum(-1),
            outside_mass_T=l_TV[:, shared:].exp().sum(-1).detach(),
        )

"""A dense float64 reference of the whole objective, written from the formula and sharing no code with the product.

    J = mean over prompts, mean over the group, mean over the response's loss tokens of
          min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - beta KL(pi(.|prefix) || teacher(.|prefix))
    r = pi(token) / pi_old(token),   A = (R - mean of the group) / (std of the group + epsilon)

The loss is -J. Every sequence is run alone through the models, every token's distribution is written out, and autograd
does the rest: slow, and plain enough to be checked by reading. Both models' logits are divided by one temperature.
Where the two vocabularies differ in size, the KL is between both distributions restricted to the shared ids and
renormalised; the policy itself is always over all of the student's ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [n] to logits [n, V]; row i predicts token i + 1."""


@dataclass(frozen=True)
class Response:
    prompt: Sequence[int]
    tokens: Sequence[int]
    reward: float
    group: str | int
    """Responses of the same group share a prompt."""
    old_logprobs: Sequence[float] | None = None
    """One per token of the response (those without loss are ignored); None: the old policy is the current one."""
    mask: Sequence[bool] | None = None
    """Which tokens of the response are loss tokens; None: all of them."""


@dataclass
class Reference:
    loss: torch.Tensor
    surrogate: torch.Tensor  # the loss's first part, -J without the KL
    kl: torch.Tensor  # the KL's prompt-group-token mean, without beta
    advantages: list[float]
    logprobs: list[list[float]]  # per response, per loss token
    kls: list[list[float]]
    ratios: list[list[float]]
    clipped_high: float = 0.0  # share of the loss tokens whose gradient the upper bound removes
    clipped_low: float = 0.0


def dgrpo(
    responses: Sequence[Response],
    student: Logits,
    teacher: Logits | None,
    *,
    beta: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    temperature: float = 1.0,
    std: str = "population",
    epsilon: float = 1e-6,
) -> Reference:
    """The dGRPO loss of a batch of responses, differentiable through `student`."""
    groups: dict[str | int, list[int]] = {}
    for i, response in enumerate(responses):
        groups.setdefault(response.group, []).append(i)
    advantages = _advantages([r.reward for r in responses], groups, std, epsilon)

    surrogate = torch.zeros((), dtype=torch.float64)
    kl_mean = torch.zeros((), dtype=torch.float64)
    out = Reference(surrogate, surrogate, kl_mean, advantages, *_per_response(len(responses)))
    for members in groups.values():
        for i in members:
            policy, kls = _response(responses[i], student, teacher, temperature)
            gain, ratios = _surrogate(policy, _old(responses[i]), advantages[i], clip_low, clip_high)
            share = len(groups) * len(members) * len(policy)
            surrogate = surrogate - torch.stack(gain).sum() / share
            out.logprobs[i], out.kls[i], out.ratios[i] = [x.item() for x in policy], [x.item() for x in kls], ratios
            if kls:
                kl_mean = kl_mean + torch.stack(kls).sum() / share
    _count_clipped(out, clip_low, clip_high)
    out.surrogate, out.kl, out.loss = surrogate, kl_mean, surrogate + beta * kl_mean
    return out


def nll(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], student: Logits) -> torch.Tensor:
    """SFT: the mean over all answer tokens of -log pi, for (prompt, answer) pairs."""
    losses = []
    for prompt, answer in sequences:
        log_p = torch.log_softmax(student(torch.tensor([*prompt, *answer])).double(), dim=-1)
        losses += [-log_p[len(prompt) + t - 1, token] for t, token in enumerate(answer)]
    return torch.stack(losses).mean()


def _per_response(n: int) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    return [[] for _ in range(n)], [[] for _ in range(n)], [[] for _ in range(n)]


def _advantages(rewards: list[float], groups: dict[str | int, list[int]], std: str, epsilon: float) -> list[float]:
    advantages = [0.0] * len(rewards)
    for members in groups.values():
        of_group = [rewards[i] for i in members]
        if all(reward == of_group[0] for reward in of_group):
            continue
        mean = sum(of_group) / len(of_group)
        squares = sum((reward - mean) ** 2 for reward in of_group)
        deviation = math.sqrt(squares / (len(of_group) - (1 if std == "sample" else 0)))
        for i in members:
            advantages[i] = (rewards[i] - mean) / (deviation + epsilon)
    return advantages


def _response(
    response: Response, student: Logits, teacher: Logits | None, temperature: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-prob and KL(student || teacher) of each loss token."""
    ids = torch.tensor([*response.prompt, *response.tokens])
    student_logits = student(ids).double() / temperature
    with torch.no_grad():
        teacher_logits = None if teacher is None else teacher(ids).double() / temperature
    policy, kls = [], []
    for t, token in enumerate(response.tokens):
        if response.mask is not None and not response.mask[t]:
            continue
        row = len(response.prompt) + t - 1
        policy.append(torch.log_softmax(student_logits[row], dim=-1)[token])
        if teacher_logits is not None:
            shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
            log_p = torch.log_softmax(student_logits[row, :shared], dim=-1)
            log_q = torch.log_softmax(teacher_logits[row, :shared], dim=-1)
            kls.append((log_p.exp() * (log_p - log_q)).sum())
    return policy, kls


def _old(response: Response) -> list[float] | None:
    if response.old_logprobs is None:
        return None
    mask = response.mask if response.mask is not None else [True] * len(response.tokens)
    return [float(x) for x, loss in zip(response.old_logprobs, mask, strict=True) if loss]


def _surrogate(
    policy: list[torch.Tensor], old: list[float] | None, advantage: float, clip_low: float, clip_high: float
) -> tuple[list[torch.Tensor], list[float]]:
    gains, ratios = [], []
    for t, logprob in enumerate(policy):
        ratio = torch.exp(logprob - (logprob.detach() if old is None else old[t]))
        clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
        gains.append(torch.minimum(ratio * advantage, clipped * advantage))
        ratios.append(ratio.item())
    return gains, ratios


def _count_clipped(out: Reference, clip_low: float, clip_high: float) -> None:
    total = sum(len(ratios) for ratios in out.ratios)
    high = sum(r > 1 + clip_high for a, rs in zip(out.advantages, out.ratios, strict=True) for r in rs if a > 0)
    low = sum(r < 1 - clip_low for a, rs in zip(out.advantages, out.ratios, strict=True) for r in rs if a < 0)
    out.clipped_high, out.clipped_low = high / max(total, 1), low / max(total, 1)

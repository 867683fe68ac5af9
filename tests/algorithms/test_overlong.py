"""Cut-off responses: penalties from the formula, and losses and gradients of masks against plain float64 autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
from megatron_dgrpo.algorithms.losses import attach
from megatron_dgrpo.algorithms.overlong import length_by_reward, penalties
from megatron_dgrpo.config.objective import Objective, OPDObjective
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing.dense import DenseStatistics

V, BETA = 7, 0.5
BATCH = [("a", 3, "stop", 1.0), ("a", 5, "length", 0.0), ("b", 5, "length", 1.0), ("b", 2, "stop", 0.5)]


def batch() -> list[Trajectory]:
    draw = np.random.default_rng(0)
    seen: dict[str, int] = {}
    found = []
    for prompt, length, reason, _ in BATCH:
        sample = seen[prompt] = seen.get(prompt, -1) + 1
        found.append(Trajectory(prompt, sample, np.asarray([1]), (Segment(draw.integers(0, V, length), True),), reason))
    return found


def _gain(factor: float, logprob: torch.Tensor) -> torch.Tensor:
    return factor * (logprob - logprob.detach()).exp()


@pytest.mark.parametrize("aggregation", ["sequence_group_prompt_mean", "sequence_mean", "token_mean"])
@pytest.mark.parametrize("overlong", ["keep", "mask_surrogate", "mask"])
def test_loss_and_gradient_of_masks(overlong: str, aggregation: str) -> None:
    objective = Objective.model_validate({"beta": BETA, "overlong": overlong, "aggregation": aggregation})
    trajectories, rewards = batch(), [reward for *_, reward in BATCH]
    num_tokens = sum(length for _, length, *_ in BATCH)
    generator = torch.Generator().manual_seed(1)
    student_NV, teacher_NV = (torch.randn(num_tokens, V, dtype=torch.float64, generator=generator) for _ in range(2))
    student_NV.requires_grad_()
    streams = dgrpo_streams(trajectories, rewards, objective).streams
    loss, factors = dgrpo_loss(objective)
    statistics = DenseStatistics.of(student_NV, teacher_NV, streams.targets_N, temperature=1.0)
    scalar = attach(loss.evaluate(statistics, streams, factors), statistics)
    scalar.backward()
    found, student_NV.grad = student_NV.grad.clone(), None

    advantages = [0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6), 0.25 / (0.25 + 1e-6), -0.25 / (0.25 + 1e-6)]
    log_p, log_q = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    expected, start = torch.zeros((), dtype=torch.float64), 0
    for (_, length, reason, _), trajectory, advantage in zip(BATCH, trajectories, advantages, strict=True):
        for masked, value_of in (
            (overlong != "keep", lambda row, token, a=advantage: _gain(-a, log_p[row, token])),
            (overlong == "mask", lambda row, token: BETA * (log_p[row].exp() * (log_p[row] - log_q[row])).sum()),
        ):  # fmt: skip
            if masked and reason == "length":
                continue
            kept = sum(n for _, n, r, _ in BATCH if not (masked and r == "length"))
            share = kept if aggregation == "token_mean" else 4 * length  # 2 prompts x 2 responses
            for t, token in enumerate(trajectory.response_tokens.tolist()):
                expected = expected + value_of(start + t, token) / share
        start += length
    expected.backward()
    assert float(scalar) == pytest.approx(float(expected), rel=1e-12)
    assert (found - student_NV.grad).abs().max() <= 1e-12 * student_NV.grad.abs().max()
    if overlong == "mask":
        assert (found[3:13] == 0).all() and (found[:3] != 0).any()


def test_masks_of_a_stage_without_rewards() -> None:
    objective = OPDObjective.model_validate({"overlong": "mask"})
    streams = dgrpo_streams(batch(), [0.0] * 4, objective).streams
    assert streams.advantages_N is None and streams.weights.keys() == {"teacher_kl"}
    assert streams.weights["teacher_kl"].tolist() == pytest.approx([1 / 12] * 3 + [0] * 10 + [1 / 8] * 2)


def test_the_soft_penalty() -> None:
    def at(length: int, **settings: Any) -> float:
        objective = Objective.model_validate({"overlong": {"kind": "penalise", "cache": 4} | settings})
        one = Trajectory("a", 0, np.asarray([1]), (Segment(np.zeros(length, int), True),), "stop")
        return float(penalties(objective, [one], 10)[0])

    assert [at(n) for n in (1, 6, 7, 8, 9, 10)] == [0, 0, -0.25, -0.5, -0.75, -1.0]
    assert at(10, penalty=0.5) == -0.5
    assert penalties(Objective(), batch(), 5).tolist() == [0.0] * 4


def test_length_by_reward_is_within_groups() -> None:
    ids, lengths = ["a", "a", "b", "b", "c", "c"], [3, 5, 5, 2, 9, 9]
    found = length_by_reward(ids, lengths, [1.0, 0.0, 1.0, 0.5, 0.3, 0.3])
    assert found == {"response/length_above": 4.0, "response/length_below": 3.5}
    assert length_by_reward(["a", "a"], [1, 2], [1.0, 1.0]) == {}

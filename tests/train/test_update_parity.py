"""One dGRPO step against the dense float64 reference: the loss, every parameter's gradient, at several layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Objective
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.reference import Response, dgrpo
from megatron_dgrpo.testing.tiny import save_tiny_qwen3
from megatron_dgrpo.testing.transformers_reference import as_reference

TEMPERATURE = 0.7
OBJECTIVE = Objective(clip_low=0.2, clip_high=0.28, beta=0.5)
REWARDS = [[1.0, 0.0, 0.25, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.5]]  # the second group has no variance
SIZES = {"vocab_size": 96, "heads": 4, "kv_heads": 2, "std": 0.08, "random_norms": True}
RATIOS = (0.5, 0.9, 1.1, 1.7)


def _responses() -> list[Response]:
    """Ragged groups and responses, one of a single token, one with a tool's output in its middle."""
    draw = np.random.default_rng(1)
    responses = []
    for group, rewards in enumerate(REWARDS):
        prompt = draw.integers(0, 90, 5 + 3 * group).tolist()
        for sample, reward in enumerate(rewards):
            tokens = draw.integers(0, 96, 1 if (group, sample) == (0, 1) else int(draw.integers(3, 9))).tolist()
            mask = [not (sample == 2 and 1 <= t <= 2) for t in range(len(tokens))]
            responses.append(Response(prompt, tokens, reward, group, mask=mask))
    return responses


def _with_old_logprobs(responses: list[Response], student: object, teacher: object) -> list[Response]:
    """Old log-probs that make the ratios 0.5, 0.9, 1.1, 1.7 in turn: beyond both bounds and inside, for both signs."""
    live = dgrpo(responses, student, teacher, beta=OBJECTIVE.beta.value, temperature=TEMPERATURE).logprobs
    staled, turn = [], 0
    for response, logprobs in zip(responses, live, strict=True):
        old, values = [], iter(logprobs)
        for trained in response.mask:
            old.append(next(values) - np.log(RATIOS[turn % 4]) if trained else 0.0)
            turn += trained
        staled.append(replace(response, old_logprobs=old))
    return staled


def _trajectories(responses: list[Response]) -> list[Trajectory]:
    samples: dict[object, int] = {}
    result = []
    for response in responses:
        sample = samples[response.group] = samples.get(response.group, -1) + 1
        segments, start = [], 0
        mask = [*response.mask, None]
        for t in range(1, len(mask)):
            if mask[t] != mask[start]:
                old = np.asarray(response.old_logprobs[start:t]) if response.old_logprobs and mask[start] else None
                segments.append(Segment(np.asarray(response.tokens[start:t]), bool(mask[start]), old_logprobs=old))
                start = t
        prompt = np.asarray(response.prompt)
        result.append(Trajectory(str(response.group), sample, prompt, tuple(segments), "stop"))
    return result


def _step(rank, world, folder, teacher_folder, trajectories, rewards, tp, sp, dtype, budget):
    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
    from megatron_dgrpo.packing.pack import from_trajectories, pack, share
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.update import Work, compute_gradients

    groups = Groups(tp=tp, dp=world // tp)
    groups.seed(0)
    student = load_student(folder, groups=groups, dtype=dtype, sequence_parallel=sp)
    teacher = load_teacher(teacher_folder, student.decoder, groups=groups, dtype=dtype, sequence_parallel=sp)
    streams = dgrpo_streams(trajectories, rewards, OBJECTIVE).streams
    mine = share(from_trajectories(trajectories), groups.grid.coordinate("dp"), groups.grid.dp)
    layouts = pack(mine, max_tokens=budget, multiple_of=4)
    loss, factors = dgrpo_loss(OBJECTIVE)
    rows = teacher.score(layouts)
    metrics = compute_gradients(student, Work(layouts, streams, loss, factors, TEMPERATURE, teacher.head, rows))
    gather_data_parallel_gradients(student.wrapped, groups.dp_cp)
    return metrics, pieces(student.decoder, "main_grad"), len(layouts)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("world", "tp", "sp", "budget", "dtype", "within"),
    [
        (1, 1, False, 32, torch.float64, 1e-10),
        (1, 1, False, 256, torch.float64, 1e-10),
        (2, 2, False, 64, torch.float64, 1e-10),
        (2, 2, True, 64, torch.float64, 1e-10),
        (2, 1, False, 64, torch.float64, 1e-10),
        (4, 2, True, 32, torch.float64, 1e-10),
        (2, 2, True, 64, torch.float32, 1e-5),
    ],
)
def test_loss_and_gradients_equal_the_dense_reference(
    tmp_path: Path, tied: bool, world: int, tp: int, sp: bool, budget: int, dtype: torch.dtype, within: float
) -> None:
    folder = save_tiny_qwen3(tmp_path / "student", tied=tied, seed=1, **SIZES)
    teacher_folder = save_tiny_qwen3(tmp_path / "teacher", tied=not tied, hidden=96, layers=3, seed=2, **SIZES)
    reference, teacher = (as_reference(path, torch.float64) for path in (folder, teacher_folder))
    models = [lambda ids, model=model: model(ids[None]).logits[0] for model in (reference, teacher)]
    responses = _with_old_logprobs(_responses(), *models)
    expected = dgrpo(
        responses, *models, beta=OBJECTIVE.beta.value, clip_low=0.2, clip_high=0.28, temperature=TEMPERATURE
    )
    _assert_the_case_is_hard(responses, expected)
    reference.zero_grad()
    expected.loss.backward()

    rewards = [r.reward for r in responses]
    ranks = run_distributed(
        _step, world, str(folder), str(teacher_folder), _trajectories(responses), rewards, tp, sp, dtype, budget
    )
    for metrics, _, _ in ranks:
        assert metrics["loss"] == pytest.approx(expected.loss.item(), rel=within)
        assert metrics["teacher_kl/loss"] == pytest.approx(expected.kl.item(), rel=within)
    gradients = whole((found for _, found, _ in ranks), tolerance=within)
    for name, parameter in reference.named_parameters():
        assert relative_error(gradients[name], parameter.grad) <= within, name
    assert (ranks[0][2] == 1) == (budget == 256)


def _assert_the_case_is_hard(responses, expected) -> None:
    """At least 10 % of the tokens of either sign of the advantage lie beyond each bound; one group has advantage 0."""
    for sign in (1, -1):
        ratios = [r for a, rs in zip(expected.advantages, expected.ratios, strict=True) if a * sign > 0 for r in rs]
        assert sum(r > 1.28 for r in ratios) >= 0.1 * len(ratios) and sum(r < 0.8 for r in ratios) >= 0.1 * len(ratios)
    assert [a for a, r in zip(expected.advantages, responses, strict=True) if r.group == 1] == [0.0, 0.0, 0.0]

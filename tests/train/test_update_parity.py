"""One dGRPO step against the dense float64 reference: the loss, every parameter's gradient, at several layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Layout, Objective
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.reference import Response, dgrpo
from megatron_dgrpo.testing.tiny import save_tiny
from megatron_dgrpo.testing.transformers_reference import as_reference

TEMPERATURE = 0.7
OBJECTIVE = Objective(clip_low=0.2, clip_high=0.28, beta=0.5)
# The second group has no variance; the last one is a single response, to a prompt of fewer tokens than ranks.
REWARDS = [[1.0, 0.0, 0.25, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.5], [0.5]]
PROMPTS = [5, 8, 11, 2]
SIZES = {"vocab_size": 96, "heads": 4, "kv_heads": 2, "std": 0.08, "random_norms": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
RATIOS = (0.5, 0.9, 1.1, 1.7)


def _responses() -> list[Response]:
    """Ragged groups and responses, one of a single token, one with a tool's output in its middle."""
    draw = np.random.default_rng(1)
    responses = []
    for group, rewards in enumerate(REWARDS):
        prompt = draw.integers(0, 90, PROMPTS[group]).tolist()
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


@dataclass(frozen=True)
class Case:
    student: Layout = Layout()
    teacher: Layout | None = None
    """None: the student's."""
    disjoint: bool = False
    """The teacher has ranks of its own, after the student's."""
    memory: str = "device"
    dtype: torch.dtype = torch.float64
    within: float = 1e-10
    max_tokens: int = 64
    recompute: str = "none"
    form: str = "trees"

    @property
    def world(self) -> int:
        sizes = self.student.world_size, (self.teacher or self.student).world_size
        return sum(sizes) if self.disjoint else max(sizes)


def _step(rank, world, folder, teacher_folder, trajectories, rewards, case):
    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.flops import training_cost
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing import trees
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.teachers import Lesson
    from megatron_dgrpo.train.update import Work, compute_gradients

    def groups_of(layout, first_rank=0):
        return Groups(
            tp=layout.tp, cp=layout.cp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp, first_rank=first_rank
        )

    def options_of(layout, recompute="none"):
        return BuildOptions(case.dtype, sequence_parallel=layout.sequence_parallel, vpp=layout.vpp, recompute=recompute)

    groups = groups_of(case.student)
    taught_by = case.teacher or case.student
    own = groups if case.teacher is None else groups_of(taught_by, groups.grid.size if case.disjoint else 0)
    (groups if groups.member else own).seed(0)
    teacher = load_teacher(
        teacher_folder,
        groups=own,
        options=options_of(taught_by),
        student_spec=read_spec(folder),
        student_groups=groups,
        weights_in=case.memory,
        rows_in=case.memory,
    )
    grown = getattr(trees, case.form)(trajectories)
    packing = Packing(
        case.max_tokens,
        dp=case.student.dp,
        cp=case.student.cp,
        multiple_of=2 * case.student.tp,
        rounds_of=case.student.pp if case.student.vpp > 1 else 1,
        cost=training_cost(read_spec(folder)),
        piece_tokens=8,
    )
    rows = teacher.rows(grown, packing)
    if not groups.member:
        assert rows is None and teacher.head is None
        return None
    student = load_student(folder, groups=groups, options=options_of(case.student, case.recompute))
    place = groups.grid.coordinate
    batches = packing.micro_batches(grown, rank=place("dp"), cp_rank=place("cp"))
    loss, factors = dgrpo_loss(OBJECTIVE)
    streams = dgrpo_streams(trajectories, rewards, OBJECTIVE).streams
    metrics = compute_gradients(
        student, Work(batches, streams, loss, factors, TEMPERATURE, [Lesson("teacher", teacher.head, rows)])
    )
    gather_data_parallel_gradients(student.wrapped)
    return metrics, pieces(student.decoder, "main_grad"), len(batches)


CASES = {
    "one rank": Case(max_tokens=32),
    "one rank, one micro-batch": Case(max_tokens=256),
    "tp2": Case(Layout(tp=2)),
    "tp2 sp": Case(Layout(tp=2, sequence_parallel=True)),
    "dp2": Case(Layout(dp=2)),
    "tp2 dp2 sp": Case(Layout(tp=2, dp=2, sequence_parallel=True), max_tokens=32),
    "tp2 sp float32": Case(Layout(tp=2, sequence_parallel=True), dtype=torch.float32, within=1e-5),
    "tp2 dp2 sp, prompts repeated": Case(Layout(tp=2, dp=2, sequence_parallel=True), form="documents", max_tokens=32),
    "cp2": Case(Layout(cp=2)),
    "cp2 dp2": Case(Layout(cp=2, dp=2), max_tokens=32),
    "cp4 dp2": Case(Layout(cp=4, dp=2), max_tokens=32),
    "tp2 cp2 sp recompute": Case(Layout(tp=2, cp=2, sequence_parallel=True), recompute="full"),
    "tp2 cp4 sp": Case(Layout(tp=2, cp=4, sequence_parallel=True), max_tokens=256),
    "tp2 cp2 float32": Case(Layout(tp=2, cp=2), dtype=torch.float32, within=1e-5),
    "cp4, prompts repeated": Case(Layout(cp=4), form="documents"),
    "pp2 cp2 dp2": Case(Layout(pp=2, cp=2, dp=2), max_tokens=32),
    "tp2 pp2 cp2 sp": Case(Layout(tp=2, pp=2, cp=2, sequence_parallel=True)),
    "cp2 taught by tp2": Case(Layout(cp=2), Layout(tp=2)),
    "tp2 taught by cp2 on its own ranks": Case(Layout(tp=2), Layout(cp=2), disjoint=True),
    "pp2": Case(Layout(pp=2), max_tokens=32),
    "pp2 vpp2, rows in host memory": Case(Layout(pp=2, vpp=2), memory="host", max_tokens=32),
    "tp2 pp2 sp recompute": Case(Layout(tp=2, pp=2, sequence_parallel=True), recompute="full"),
    "dp2 taught by tp2 pp2": Case(Layout(dp=2), Layout(tp=2, pp=2)),
    "dp2 taught by tp2 pp2 on its own ranks": Case(Layout(dp=2), Layout(tp=2, pp=2), disjoint=True),
    "dp2 taught by tp2 pp2, in host memory": Case(Layout(dp=2), Layout(tp=2, pp=2), memory="host"),
    "dp2 taught by tp2 pp2 vpp2 on its own ranks, in host memory": Case(
        Layout(dp=2), Layout(tp=2, pp=2, vpp=2), disjoint=True, memory="host"
    ),
    "tp2 pp2 taught by dp2, rows in host memory": Case(
        Layout(tp=2, pp=2, sequence_parallel=True), Layout(dp=2), memory="host"
    ),
    "tp4 taught by tp2 dp2 sp": Case(Layout(tp=4), Layout(tp=2, dp=2, sequence_parallel=True), memory="host"),
    "tp2 dp2 taught by pp2 on its own ranks, rows in host memory": Case(
        Layout(tp=2, dp=2), Layout(pp=2), disjoint=True, memory="host"
    ),
}


# A tied Qwen3 and an untied Llama: both where embedding and head are on different ranks, elsewhere one or the other.
KINDS = [
    (name, tied)
    for number, name in enumerate(CASES)
    for tied in (True, False)
    if CASES[name].student.pp > 1 or tied == (number % 2 == 0)
]


@pytest.mark.parametrize(("name", "tied"), KINDS, ids=[f"{name}{'' if tied else ', Llama'}" for name, tied in KINDS])
def test_loss_and_gradients_equal_the_dense_reference(tmp_path: Path, tied: bool, name: str) -> None:
    case = CASES[name]
    family = {} if tied else {"family": "Llama", "rope": LLAMA3}
    folder = save_tiny(tmp_path / "student", tied=tied, seed=1, layers=4, **SIZES, **family)
    teacher_folder = save_tiny(tmp_path / "teacher", tied=not tied, hidden=96, layers=4, seed=2, **SIZES)
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
        _step, case.world, str(folder), str(teacher_folder), _trajectories(responses), rewards, case
    )
    trained = [rank for rank in ranks if rank is not None]
    assert len(trained) == case.student.world_size
    for metrics, _, _ in trained:
        assert metrics == trained[0][0]
        assert metrics["loss"] == pytest.approx(expected.loss.item(), rel=case.within)
        assert metrics["teacher_kl/loss"] == pytest.approx(expected.kl.item(), rel=case.within)
    gradients = whole((found for _, found, _ in trained), tolerance=case.within)
    for parameter_name, parameter in reference.named_parameters():
        assert relative_error(gradients[parameter_name], parameter.grad) <= case.within, parameter_name
    assert trained[0][2] > 1 or case.max_tokens > 32  # several micro-batches, where they are small


def _assert_the_case_is_hard(responses, expected) -> None:
    """At least 10 % of the tokens of either sign of the advantage lie beyond each bound; one group has advantage 0."""
    for sign in (1, -1):
        ratios = [r for a, rs in zip(expected.advantages, expected.ratios, strict=True) if a * sign > 0 for r in rs]
        assert sum(r > 1.28 for r in ratios) >= 0.1 * len(ratios) and sum(r < 0.8 for r in ratios) >= 0.1 * len(ratios)
    assert [a for a, r in zip(expected.advantages, responses, strict=True) if r.group == 1] == [0.0, 0.0, 0.0]

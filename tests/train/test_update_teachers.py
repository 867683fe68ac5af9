"""Steps with two teachers of different families, sizes and vocabularies against the dense float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from test_update_parity import OBJECTIVE, SIZES, TEMPERATURE, _responses, _trajectories, _with_old_logprobs

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.reference import dgrpo
from megatron_dgrpo.testing.tiny import save_tiny
from megatron_dgrpo.testing.transformers_reference import as_reference

NAMES = ("large", "small")
BATCHES = {"mixed": ["large", "small", "small", "large"], "one has nothing": ["small"] * 4}
"""The teacher of each prompt."""


@dataclass(frozen=True)
class Case:
    student: Layout
    teachers: tuple[Layout, Layout]
    first_ranks: tuple[int, int]
    world: int
    rows_in: tuple[str, str] = ("device", "device")


CASES = {
    "dp2 taught by tp2 and pp2": Case(Layout(dp=2), (Layout(tp=2), Layout(pp=2)), (0, 0), 2, ("host", "device")),
    "tp2 sp taught by tp2 and by pp2 on its own ranks": Case(
        Layout(tp=2, sequence_parallel=True), (Layout(tp=2), Layout(pp=2)), (0, 2), 4, ("host", "host")
    ),
    "pp2 taught by tp2 and dp2, each on its own ranks": Case(
        Layout(pp=2), (Layout(tp=2), Layout(dp=2)), (2, 4), 6, ("device", "host")
    ),
}


def _step(rank, world, folder, teacher_folders, batches, rewards, case):
    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
    from megatron_dgrpo.algorithms.losses import Loss
    from megatron_dgrpo.algorithms.sequence_terms import SequenceSurrogate
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train.preflight import check_update
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.teachers import Teachers
    from megatron_dgrpo.train.update import Work, compute_gradients

    def groups_of(layout, first_rank=0):
        return Groups(tp=layout.tp, cp=layout.cp, dp=layout.dp, pp=layout.pp, first_rank=first_rank)

    def options_of(layout):
        return BuildOptions(torch.float64, sequence_parallel=layout.sequence_parallel)

    groups = groups_of(case.student)
    own = [groups_of(*place) for place in zip(case.teachers, case.first_ranks, strict=True)]
    next(mine for mine in (groups, *own) if mine.member).seed(0)
    models = [
        load_teacher(
            teacher_folders[i],
            groups=own[i],
            options=options_of(case.teachers[i]),
            student_spec=read_spec(folder),
            student_groups=groups,
            rows_in=case.rows_in[i],
        )
        for i in range(2)
    ]
    teachers = Teachers(NAMES, tuple(models))
    packing = Packing(32, dp=case.student.dp, multiple_of=4)
    student = load_student(folder, groups=groups, options=options_of(case.student)) if groups.member else None
    found = {}
    for name, trajectories in batches.items():
        lessons, again = (teachers.teach(trajectories, packing) for _ in range(2))
        if student is None:
            continue
        layouts = packing.micro_batches(trees(trajectories), rank=groups.grid.coordinate("dp"))
        loss, factors = dgrpo_loss(OBJECTIVE)
        streams = dgrpo_streams(trajectories, rewards, OBJECTIVE, NAMES).streams
        work = Work(layouts, streams, loss, factors, TEMPERATURE, lessons, balance=True)
        checked = check_update(student, work, again, factors)
        ways = {"fast": work}
        # the other way through the heads: a term that counts for nothing and must see the whole batch first
        slow = replace(
            work,
            loss=Loss((*loss.terms, SequenceSurrogate(name="other"))),
            factors=factors | {"other": 0.0},
            streams=replace(streams, weights=streams.weights | {"other": streams.weights["surrogate"]}),
        )
        if name == "mixed":
            ways["slow"] = slow
        for way, one in ways.items():
            metrics = compute_gradients(student, one)
            gather_data_parallel_gradients(student.wrapped)
            found[name, way] = metrics | checked, pieces(student.decoder, "main_grad")
    return found or None


def _by_prompt(models, responses, names):
    """The reference's teacher: that of the prompt with which the ids begin."""
    of_prompt = {tuple(r.prompt): models[names[r.group]] for r in responses}

    def logits(ids):
        (model,) = [m for prompt, m in of_prompt.items() if tuple(ids[: len(prompt)].tolist()) == prompt]
        return model(ids)

    return logits


@pytest.mark.parametrize("name", CASES)
def test_each_row_is_drawn_to_its_own_teacher(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    folder = save_tiny(tmp_path / "student", tied=False, seed=1, layers=2, **SIZES)
    large = save_tiny(tmp_path / "large", tied=True, hidden=96, layers=4, seed=2, **SIZES | {"vocab_size": 104})
    small = save_tiny(tmp_path / "small", "Llama", tied=False, hidden=48, layers=2, seed=3, **SIZES)
    models = [as_reference(path, torch.float64) for path in (folder, large, small)]
    student, *teachers = [lambda ids, model=model: model(ids[None]).logits[0] for model in models]
    by_name = dict(zip(NAMES, teachers, strict=True))
    responses = _with_old_logprobs(_responses(), student, None)
    batches = {
        batch: [replace(t, teacher=names[int(t.prompt_id)]) for t in _trajectories(responses)]
        for batch, names in BATCHES.items()
    }
    rewards = [r.reward for r in responses]
    ranks = run_distributed(_step, case.world, str(folder), [str(large), str(small)], batches, rewards, case)
    trained = [rank for rank in ranks if rank is not None]
    assert len(trained) == case.student.world_size
    for batch, names in BATCHES.items():
        expected = dgrpo(
            responses,
            student,
            _by_prompt(by_name, responses, names),
            beta=OBJECTIVE.beta.value,
            clip_low=0.2,
            clip_high=0.28,
            temperature=TEMPERATURE,
        )
        models[0].zero_grad()
        expected.loss.backward()
        for way in ("fast", "slow") if batch == "mixed" else ("fast",):
            metrics = trained[0][batch, way][0]
            assert all(rank[batch, way][0] == metrics for rank in trained)
            assert metrics["loss"] == pytest.approx(expected.loss.item(), rel=1e-10)
            for teacher in NAMES:
                own = [xs for r, xs in zip(responses, expected.kls, strict=True) if names[r.group] == teacher]
                kls = [x for xs in own for x in xs]
                assert (f"kl/{teacher}" in metrics) == bool(kls)
                if kls:
                    assert metrics[f"kl/{teacher}"] == pytest.approx(sum(kls) / len(kls), rel=1e-9)
            assert metrics["gradient/teacher_kl/norm"] > 0 and metrics["preflight/second_score"] <= 1e-12
            assert metrics["preflight/identical_kl"] <= 1e-12 and metrics["preflight/perturbed_changes"] > 1e-2
            gradients = whole((rank[batch, way][1] for rank in trained), tolerance=1e-9)
            for parameter_name, parameter in models[0].named_parameters():
                assert relative_error(gradients[parameter_name], parameter.grad) <= 1e-9, (batch, way, parameter_name)

"""The preflight of the trainer, with real models, heads and teacher rows at TP2 and DP2; faults go into its tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from test_update_parity import SIZES, TEMPERATURE, _responses, _trajectories

from megatron_dgrpo.config.coefficients import Linear
from megatron_dgrpo.config.objective import Objective
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

OBJECTIVES = {
    "exact": Objective(),
    "warm-up": Objective(beta=Linear(start=0.0, end=1.0, steps=3)),
    "jsd": Objective.model_validate({"divergence": "jsd"}),
    "sampled": Objective.model_validate({"estimator": "sampled"}),
    "topk": Objective.model_validate({"estimator": {"kind": "topk_teacher", "k": 5}}),
}


def _faults(work, rank):
    """Name -> the work with something wrong in it."""
    (lesson,), streams = work.lessons, work.streams
    rows, head = lesson.rows, lesson.head
    having = lambda **change: replace(work, lessons=[replace(lesson, **change)])  # noqa: E731
    with_rows = lambda hidden_MH: having(rows=replace(rows, hidden_MH=hidden_MH))  # noqa: E731
    silent = replace(streams, weights=streams.weights | {"teacher_kl": torch.zeros(streams.num_tokens)})
    scaled = replace(head, weight_VH=head.weight_VH / TEMPERATURE)
    return {
        "rows shuffled": with_rows(rows.hidden_MH.roll(1, 0)),
        "rows of one rank": with_rows(rows.hidden_MH.roll(1, 0)) if rank == 3 else work,
        "rows not a number": with_rows(rows.hidden_MH * float("nan")),
        "coefficient dropped": replace(work, factors=work.factors | {"teacher_kl": 0.0}),
        "weights of the term": replace(work, streams=silent),
        "head scaled": having(head=scaled),
    }


def _check(rank, world, folder, teacher_folder, trajectories, rewards, dtype):
    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams, head_options
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train.preflight import check_update
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.teachers import Lesson
    from megatron_dgrpo.train.update import Work

    groups = Groups(tp=2, dp=2)
    groups.seed(0)
    models = {"groups": groups, "options": BuildOptions(dtype, sequence_parallel=True)}
    student = load_student(folder, **models)
    before = [p.detach().clone() for p in student.decoder.parameters()]
    models |= {"student_spec": read_spec(folder), "student_groups": groups}
    teachers = {"other": load_teacher(teacher_folder, **models), "same": load_teacher(folder, **models)}
    grown, packing = trees(trajectories), Packing(48, dp=2, multiple_of=4)
    layouts = packing.micro_batches(grown, rank=groups.grid.coordinate("dp"))

    def work_of(objective, teacher):
        loss, factors = dgrpo_loss(objective)
        streams = dgrpo_streams(trajectories, rewards, objective).streams
        options = head_options(objective)
        return Work(layouts, streams, loss, factors, TEMPERATURE, lessons(teacher), head_options=options)

    def lessons(teacher):
        return [Lesson("teacher", teacher.head, teacher.rows(grown, packing))]

    sound = {}
    for name, objective in OBJECTIVES.items():
        for kind, teacher in teachers.items() if name == "exact" else [("other", teachers["other"])]:
            work = work_of(objective, teacher)
            same = ["teacher"] if kind == "same" else []
            sound[name, kind] = check_update(student, work, lessons(teacher), work.factors, same_weights=same)
    again = lessons(teachers["same"])
    work, caught = work_of(OBJECTIVES["exact"], teachers["same"]), {}
    for name, wrong in _faults(work, rank).items():
        try:
            check_update(student, wrong, again, work.factors, same_weights=["teacher"])
        except ObjectiveError as error:
            caught[name] = str(error)
    untouched = all(
        p.grad is None and (p == old).all() for p, old in zip(student.decoder.parameters(), before, strict=True)
    )
    return sound, caught, untouched and not any(p.main_grad.any() for p in student.decoder.parameters())


def test_a_sound_update_passes_and_faults_in_its_tensors_do_not(tmp_path: Path) -> None:
    folder = save_tiny_qwen3(tmp_path / "student", tied=False, seed=1, **SIZES)
    teacher = save_tiny_qwen3(tmp_path / "teacher", tied=True, hidden=96, layers=3, seed=2, **SIZES)
    responses = _responses()
    rewards = [r.reward for r in responses]
    ranks = run_distributed(_check, 4, str(folder), str(teacher), _trajectories(responses), rewards, torch.float32)
    for sound, caught, untouched in ranks:
        assert untouched
        assert sound == ranks[0][0]
        for (_, kind), measured in sound.items():
            assert measured["preflight/identical_kl"] <= 1e-6 and measured["preflight/perturbed_changes"] > 1e-2
            assert measured["preflight/identical_adds"] <= 1e-5 and measured["preflight/second_score"] <= 1e-4
            assert ("preflight/path_kl" in measured) == (kind == "same")
            assert measured.get("preflight/path_kl", 0.0) <= 1e-5
        assert set(caught) == set(_faults_said())
    for name, words in _faults_said().items():
        assert any(words in caught[name] for _, caught, _ in ranks), (name, ranks[0][1][name])
    assert "see the other ranks' logs" in ranks[0][1]["rows of one rank"]


def _faults_said() -> dict[str, str]:
    return {
        "rows shuffled": "from a second scoring of the same tokens",
        "rows of one rank": "from a second scoring of the same tokens",
        "rows not a number": "differ by nan",
        "coefficient dropped": "the coefficient of teacher_kl is 0.0 in the update, and 0.5 by the configuration",
        "weights of the term": "a perturbed teacher changes the gradient of teacher_kl by 0",
        "head scaled": "the temperature 0.7 divides the teacher's logits once more",
    }

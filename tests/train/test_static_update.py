"""An update of a kd stage against autograd on dense float64 logits: loss and every parameter's gradient, at layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_update_parity import SIZES

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny
from megatron_dgrpo.testing.transformers_reference import as_reference

WITHIN = 1e-10
LENGTHS = [(5, 4), (8, 1), (3, 7), (6, 6), (2, 3)]
CASES: dict[str, dict[str, Any]] = {
    "forward": {},
    "forward and likelihood": {"beta": 0.7, "nll": 0.3, "aggregation": "sequence_mean"},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": {"kind": "jsd", "alpha": 0.3}, "nll": 0.5},
}


def _examples() -> list[Trajectory]:
    draw = np.random.default_rng(2)
    return [
        Trajectory(f"row{i}", 0, draw.integers(0, 90, p), (Segment(draw.integers(0, 96, n), True),), "stop")
        for i, (p, n) in enumerate(LENGTHS)
    ]


def _config(folder: str, teacher: str, student_axes: Any, teacher_axes: Any, objective: Any) -> Any:
    from megatron_dgrpo.config.schema import Config

    model = {"dtype": "float64"}
    kd = {"kind": "kd", "data": {"path": "none"}, "steps": 1, "batch_size": 5, "optimizer": {"lr": 1e-2}}
    return Config.model_validate(
        {
            "run_dir": "none",
            "models": {
                "student": model | {"path": folder, "layout": student_axes},
                "teacher": model | {"path": teacher, "layout": teacher_axes},
            },
            "student": "student",
            "teachers": [{"model": "teacher"}],
            "stages": [kd | {"micro_batch_tokens": 32, "objective": objective}],
        }
    )


def _update(rank: int, world: int, folder: str, teacher: str, axes: Any, teacher_axes: Any) -> Any:
    from megatron_dgrpo.algorithms.build import dgrpo_loss
    from megatron_dgrpo.algorithms.factors import Factors
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.options import load_run_student
    from megatron_dgrpo.train.run import Run
    from megatron_dgrpo.train.static import _work
    from megatron_dgrpo.train.teaching import preflight, teach
    from megatron_dgrpo.train.update import compute_gradients

    groups, of_teacher = (
        Groups(**({"tp": 1, "dp": 1} | {k: v for k, v in a.items() if len(k) == 2})) for a in (axes, teacher_axes)
    )
    (groups if groups.member else of_teacher).seed(0)
    absent: dict[str, Any] = dict.fromkeys(("tokenizer", "store", "engines", "records", "journal"))
    found, loaded = [], None
    for objective in CASES.values():
        config = _config(folder, teacher, axes, teacher_axes, objective)
        student = load_run_student(config, groups) if groups.member else None
        run = Run(
            config=config, groups=groups, student=student, shm_prefix="", teacher_groups=(of_teacher,),
            teachers=loaded, **absent,
        )  # fmt: skip
        (stage,) = config.stages
        examples = _examples()
        loaded = run.load_teachers()
        if student is None:  # as `assist` does
            for _ in range(2):
                loaded.teach(examples, run.packing(stage.micro_batch_tokens))
            continue
        factors = Factors(stage.objective, dgrpo_loss(stage.objective)[0]).at(0)
        work, _ = _work(run, stage, examples, factors, 1)
        work = teach(run, stage, work, examples)
        checked = preflight(run, stage, work, factors, examples)
        metrics = compute_gradients(student, work)
        gather_data_parallel_gradients(student.wrapped)
        found.append((metrics | checked, pieces(student.decoder, "main_grad")))
    return found


def _expected(case: dict[str, Any], student: Any, teacher: Any) -> torch.Tensor:
    """From the formula, token by token."""
    rows, counts = [], []
    for example in _examples():
        ids = torch.from_numpy(np.concatenate([example.prompt_tokens, example.response_tokens])).long()
        with torch.no_grad():
            q_all = teacher(ids[None]).logits[0].double().log_softmax(-1)
        p_all = student(ids[None]).logits[0].double().log_softmax(-1)
        start = len(example.prompt_tokens)
        of_example = []
        for place in range(start, len(ids)):
            p, q = p_all[place - 1], q_all[place - 1]
            kind = case.get("divergence", "forward_kl")
            if kind == "forward_kl":
                value = (q.exp() * (q - p)).sum()
            elif kind == "reverse_kl":
                value = (p.exp() * (p - q)).sum()
            else:
                m = (0.7 * p.exp() + 0.3 * q.exp()).log()
                value = 0.7 * (p.exp() * (p - m)).sum() + 0.3 * (q.exp() * (q - m)).sum()
            of_example.append(case.get("beta", 1.0) * value - case.get("nll", 0.0) * p[ids[place]])
        rows.append(torch.stack(of_example))
        counts.append(len(of_example))
    if case.get("aggregation") == "sequence_mean":
        return torch.stack([of_example.mean() for of_example in rows]).mean()
    return torch.cat(rows).mean()


@pytest.mark.parametrize(
    ("axes", "teacher_axes"),
    [
        ({}, {}),
        ({"tp": 2, "sequence_parallel": True}, {"tp": 1}),
        ({"cp": 2, "dp": 2}, {"tp": 2}),
        ({"pp": 2}, {"tp": 2, "dp": 2}),
    ],
    ids=str,
)
def test_kd_equals_the_dense_reference(tmp_path: Path, axes: dict[str, Any], teacher_axes: dict[str, Any]) -> None:
    folder = save_tiny(tmp_path / "student", tied=True, seed=1, layers=4, **SIZES)
    teacher_folder = save_tiny(tmp_path / "teacher", tied=False, hidden=96, layers=4, seed=2, **SIZES)
    student, teacher = (as_reference(path, torch.float64) for path in (folder, teacher_folder))
    world = max(Layout(**axes).world_size, Layout(**teacher_axes).world_size)
    ranks = run_distributed(_update, world, str(folder), str(teacher_folder), axes, teacher_axes, timeout_s=280)
    trained = [rank for rank in ranks if rank]
    assert len(trained) == Layout(**axes).world_size
    for number, (name, case) in enumerate(CASES.items()):
        student.zero_grad()
        expected = _expected(case, student, teacher)
        expected.backward()
        gradients = whole((rank[number][1] for rank in trained), tolerance=WITHIN)
        for rank in trained:
            assert rank[number][0]["loss"] == pytest.approx(expected.item(), rel=WITHIN), name
            assert rank[number][0]["preflight/second_score"] <= 1e-9
        for parameter_name, parameter in student.named_parameters():
            assert relative_error(gradients[parameter_name], parameter.grad) <= WITHIN, (name, parameter_name)

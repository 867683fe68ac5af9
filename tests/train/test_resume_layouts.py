"""A checkpoint of one layout goes on at another: the next step on the same trajectories has the same loss and gradient.

Steps are those of a kd stage (forward KL and likelihood, a teacher beside the student) on fixed trajectories, in
float64, so that what a layout rounds otherwise is far below what is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dgrpo.checkpoint.manifest import Manifest, checkpoints, verify
from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny

WITHIN = 1e-6
SIZES: dict[str, Any] = {"vocab_size": 97, "heads": 4, "kv_heads": 2, "std": 0.08, "random_norms": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SP = {"sequence_parallel": True}
BEFORE = 2
"""Steps that the checkpoint has."""
STEPS = BEFORE + 2


def _examples(step: int) -> list[Trajectory]:
    draw = np.random.default_rng(step)
    return [
        Trajectory(f"{step}.{i}", 0, draw.integers(0, 97, 4), (Segment(draw.integers(0, 97, 3 + i % 4), True),), "stop")
        for i in range(6)
    ]


def _run(student: str, teacher: str, axes: dict[str, Any]) -> Any:
    from megatron_dgrpo.config.schema import Config
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.options import load_run_student
    from megatron_dgrpo.train.run import Run

    dense = {name: length for name, length in axes.items() if name not in ("ep", "etp")}
    models = {"student": (student, axes), "teacher": (teacher, dense)}
    optimizer = {"lr": 5e-3, "warmup_steps": 5, "weight_decay": 0.1, "clip_grad": 0.5}
    objective = {"beta": 0.7, "nll": 0.3}
    kd = {"kind": "kd", "data": {"path": "none"}, "steps": STEPS, "batch_size": 6, "micro_batch_tokens": 48}
    config = Config.model_validate(
        {
            "run_dir": "none",
            "models": {n: {"path": path, "dtype": "float64", "layout": its} for n, (path, its) in models.items()},
            "student": "student",
            "teachers": [{"model": "teacher"}],
            "stages": [kd | {"objective": objective, "optimizer": optimizer}],
        }
    )
    names = ("tp", "cp", "dp", "pp", "ep", "etp")
    groups, of_teacher = (Groups(**{name: its.get(name, 1) for name in names}) for _, its in models.values())
    groups.seed(0)
    absent: dict[str, Any] = dict.fromkeys(("tokenizer", "store", "engines", "records", "journal"))
    return Run(
        config=config, groups=groups, student=load_run_student(config, groups), shm_prefix="",
        teacher_groups=(of_teacher,), **absent,
    )  # fmt: skip


def _step(run: Any, step: int) -> dict[str, float]:
    from megatron_dgrpo.algorithms.build import dgrpo_loss
    from megatron_dgrpo.algorithms.factors import Factors
    from megatron_dgrpo.train.static import _work
    from megatron_dgrpo.train.teaching import teach
    from megatron_dgrpo.train.update import compute_gradients

    (stage,), examples = run.config.stages, _examples(step)
    run.load_teachers()
    factors = Factors(stage.objective, dgrpo_loss(stage.objective)[0]).at(step - 1)
    work = teach(run, stage, _work(run, stage, examples, factors, step)[0], examples)
    return compute_gradients(run.trained, work) | run.trained.update()


def _save_and_go_on(rank: int, world: int, student: str, teacher: str, folder: str, axes: dict[str, Any]) -> Any:
    from megatron_dgrpo.checkpoint.training import Saver

    run = _run(student, teacher, axes)
    (stage,) = run.config.stages
    run.trained.start_optimizer(stage.optimizer, STEPS)
    for step in range(1, BEFORE + 1):
        _step(run, step)
    saver = Saver(run.trained.decoder, folder, student, keep_last=1)
    saver.save(run.trained.optimizer, {"updates": run.trained.updates}, Manifest(0, BEFORE, {}, {}))
    found = [_step(run, step) for step in range(BEFORE + 1, STEPS + 1)]
    saved = saver.wait()
    assert saved is not None and not saved.failure, saved
    return found, pieces(run.trained.decoder, "data")


def _go_on(rank: int, world: int, student: str, teacher: str, checkpoint: str, axes: dict[str, Any]) -> Any:
    from megatron_dgrpo.checkpoint.training import load_training

    run = _run(student, teacher, axes)
    (stage,) = run.config.stages
    run.trained.start_optimizer(stage.optimizer, STEPS)
    trainer = load_training(run.trained.decoder, run.trained.optimizer, Path(checkpoint))
    run.trained.resume(trainer["updates"])
    return [_step(run, step) for step in range(BEFORE + 1, STEPS + 1)], pieces(run.trained.decoder, "data")


CASES: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("Qwen3", {"tp": 2, **SP}, [{"pp": 2}, {"cp": 2}]),
    ("Qwen3", {"cp": 2}, [{"dp": 2}]),
    ("Qwen3", {"dp": 2}, [{}, {"tp": 2, **SP}]),
    ("Qwen3", {"pp": 2, "dp": 2}, [{"tp": 2, "cp": 2}]),
    ("Qwen3Moe", {"dp": 2, "ep": 2}, [{}, {"dp": 2}, {"tp": 2, "ep": 2, **SP}, {"pp": 2}]),
    ("Qwen3Moe", {}, [{"dp": 2, "ep": 2}]),
]


@pytest.mark.parametrize(("family", "at", "others"), CASES, ids=str)
def test_the_next_steps_are_the_same_at_another_layout(
    tmp_path: Path, family: str, at: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    experts = EXPERTS if family == "Qwen3Moe" else {}
    student = str(save_tiny(tmp_path / "student", family, seed=1, layers=2, **SIZES, **experts))
    teacher = str(save_tiny(tmp_path / "teacher", seed=2, layers=2, hidden=96, **SIZES))
    ranks = run_distributed(
        _save_and_go_on, Layout(**at).world_size, student, teacher, str(tmp_path / "run"), at, timeout_s=200
    )
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert verify(checkpoint) == []
    expected, weights = ranks[0][0], whole(found for _, found in ranks)
    assert all(report["grad_norm"] > 0.5 and report["loss"] > 0.1 for report in expected), expected
    for axes in others:
        went_on = run_distributed(
            _go_on, Layout(**axes).world_size, student, teacher, str(checkpoint), axes, timeout_s=200
        )
        for reports, _ in went_on:
            for report, wanted in zip(reports, expected, strict=True):
                assert report.keys() == wanted.keys() >= {"loss", "grad_norm", "lr"}
                for name in wanted:
                    assert report[name] == pytest.approx(wanted[name], rel=WITHIN, abs=1e-9), (axes, name)
        for name, found in whole(found for _, found in went_on).items():
            assert relative_error(found, weights[name]) <= WITHIN, (axes, name)

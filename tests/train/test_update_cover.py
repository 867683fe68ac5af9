"""One update of SFT and of dGRPO at layouts in which every two axes' sizes meet, against one rank.

Which layouts these are is found by `testing.pairwise`. The rollouts are fixed, with old log-probs beyond both bounds of
the clipping, and the teacher has the student's layout with its axes moved on by one. In float64 the loss, every
parameter's gradient and Adam's first moment of it agree to 1e-9; Megatron takes the norm in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Adam, Objective
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import (
    gather_data_parallel_gradients,
    gather_first_moments,
    pieces,
    relative_error,
    whole,
)
from megatron_dgrpo.testing.pairwise import Case, pairwise
from megatron_dgrpo.testing.tiny import save_tiny

AXES = ("tp", "pp", "cp", "dp")
VOCABULARY, TEMPERATURE = 89, 0.8
SIZES = {"vocab_size": VOCABULARY, "hidden": 32, "heads": 4, "kv_heads": 2, "std": 0.15, "random_norms": True}
OBJECTIVE = Objective(clip_low=0.2, clip_high=0.28, beta=0.5)
ADAM = Adam(lr=1e-3, clip_grad=1e9, weight_decay=0.1)  # its clipping would multiply by a float32
REWARDS = (1.0, 0.0, 0.25, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.5, 1.0, 1.0)  # the second without variance
WITHIN, WITHIN_NORM = 1e-9, 1e-6


def _world(case: Case) -> int:
    return case["tp"] * case["pp"] * case["cp"] * case["dp"]


def _cover() -> list[Any]:
    """All pairs of the sizes 1 and 2, then those with 4, which take long."""
    few, found = [], []
    for sizes in ((1, 2), (1, 2, 4)):
        grid = dict.fromkeys(AXES, sizes)
        found = pairwise(grid, allowed=lambda case: 1 < _world(case) <= 8, cost=_world, already=few)
        few += [] if few else found
    cases = [(case, ()) for case in few] + [(case, pytest.mark.long) for case in found]
    name = lambda case: " ".join(f"{axis}{n}" for axis, n in case.items() if n > 1)  # noqa: E731
    return [pytest.param(case, id=name(case), marks=marks) for case, marks in cases]


def _trajectories() -> list[Trajectory]:
    draw = np.random.default_rng(7)
    result = []
    for group, rewards in enumerate(REWARDS):
        prompt = draw.integers(0, VOCABULARY, (3, 9, 6)[group])
        for sample in range(len(rewards)):
            n = int(draw.integers(1, 8))
            old = np.log(1 / VOCABULARY) + draw.normal(0, 0.7, n)
            segment = Segment(draw.integers(0, VOCABULARY, n), True, old_logprobs=old)
            result.append(Trajectory(str(group), sample, prompt, (segment,), "stop"))
    return result


def _updates(rank: int, world: int, folder: str, teacher_folder: str, case: Case, taught_by: Case) -> Any:
    """(metrics, gradients, first moments) of an update of SFT and of one of dGRPO, both from the folder's weights."""
    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams, sft_loss, sft_streams
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import documents, trees
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.teachers import Lesson
    from megatron_dgrpo.train.update import Work, compute_gradients

    groups = Groups(**case)
    groups.seed(0)
    options = BuildOptions(torch.float64, sequence_parallel=case["tp"] > 1)
    packing = Packing(48, dp=case["dp"], cp=case["cp"], multiple_of=2 * case["tp"], piece_tokens=8)
    trajectories = _trajectories()
    teacher = load_teacher(
        teacher_folder,
        groups=Groups(**taught_by),
        options=BuildOptions(torch.float64),
        student_spec=read_spec(folder),
        student_groups=groups,
    )
    grown = {"sft": documents(trajectories), "dgrpo": trees(trajectories)}
    lessons = [Lesson("teacher", teacher.head, teacher.rows(grown["dgrpo"], packing))]
    rewards = [reward for of_group in REWARDS for reward in of_group]
    of_kind: dict[str, Any] = {
        "sft": (sft_streams(trajectories).streams, *sft_loss(), 1.0),
        "dgrpo": (
            dgrpo_streams(trajectories, rewards, OBJECTIVE).streams, *dgrpo_loss(OBJECTIVE), TEMPERATURE, lessons
        ),
    }  # fmt: skip
    place, found = groups.grid.coordinate, {}
    for kind, rest in of_kind.items():
        student = load_student(folder, groups=groups, options=options)
        student.start_optimizer(ADAM)
        layouts = packing.micro_batches(grown[kind], rank=place("dp"), cp_rank=place("cp"))
        metrics = compute_gradients(student, Work(layouts, *rest))
        metrics |= student.update()
        gather_data_parallel_gradients(student.wrapped)
        gather_first_moments(student)
        found[kind] = metrics, pieces(student.decoder, "main_grad"), pieces(student.decoder, "first_moment")
    return found


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Any]:
    base = tmp_path_factory.mktemp("models")
    folders = [save_tiny(base / "student", layers=4, seed=1, **SIZES)]
    folders.append(save_tiny(base / "teacher", "Llama", layers=4, seed=2, tied=False, **SIZES | {"hidden": 48}))
    one = dict.fromkeys(AXES, 1)
    (found,) = run_distributed(_updates, 1, *map(str, folders), one, one)
    metrics, gradients, _ = found["dgrpo"]
    assert metrics["surrogate/clipped_high"] > 0.05 and metrics["surrogate/clipped_low"] > 0.05
    assert metrics["teacher_kl/loss"] > 0.01 and min(g.tensor.norm() for g in gradients) > 0
    return folders, found


@pytest.mark.parametrize("case", _cover())
def test_an_update_is_that_of_one_rank(on_one_rank: tuple[list[Path], Any], case: Case) -> None:
    folders, expected = on_one_rank
    taught_by = dict(zip(AXES, (case[axis] for axis in (*AXES[1:], AXES[0])), strict=True))
    ranks = run_distributed(_updates, _world(case), *map(str, folders), case, taught_by)
    for kind, (metrics, *of_parameters) in expected.items():
        for rank in ranks:
            assert rank[kind][0] == ranks[0][kind][0]
        found = ranks[0][kind][0]
        assert found["loss"] == pytest.approx(metrics["loss"], rel=WITHIN)
        assert found["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=WITHIN_NORM)
        for number, wanted in enumerate(of_parameters, 1):
            tensors = whole((rank[kind][number] for rank in ranks), tolerance=WITHIN)
            for name, tensor in whole([wanted]).items():
                assert relative_error(tensors[name], tensor) <= WITHIN, (kind, number, name)
        gradients, moments = map(whole, ([of_parameters[0]], [of_parameters[1]]))
        for name, moment in moments.items():  # and the moments are what they should be
            assert relative_error(moment, 0.1 * gradients[name]) <= WITHIN, name

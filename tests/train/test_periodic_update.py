"""The periodic schedule's update is the synchronous one's, whatever the chunks: gradients, weights, metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_update_parity import SIZES, _responses, _trajectories

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.testing import run_distributed, run_forked
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny

WITHIN = 1e-9
ROOM = 24
"""Tokens of a micro-batch. The longest sequence of the batch has 19."""
SMALL = 12
"""Tokens of a micro-batch that hold none of the third group and a part of the second."""
ONE_BY_ONE = [[3], [1], [0], [2]]
CHUNKS = {
    "two halves": [[0, 1], [2, 3]],
    "one by one, as they end": ONE_BY_ONE,
    "the largest first, nothing in the last": [[2], [0, 1, 3], []],
    "all at once": [[0, 1, 2, 3]],
}
AGGREGATIONS = ("sequence_group_prompt_mean", "sequence_mean", "token_mean")


def _batch() -> list[Trajectory]:
    """Ragged groups with rewards and the engine's log-probs, which are not quite the trainer's."""
    draw = np.random.default_rng(5)
    responses = _responses()
    result = []
    for trajectory, response in zip(_trajectories(responses), responses, strict=True):
        segments = tuple(
            replace(s, behaviour_logprobs=-draw.uniform(1, 6, len(s.tokens)).astype(np.float32)) if s.trained else s
            for s in trajectory.segments
        )
        result.append(replace(trajectory, segments=segments, rewards={"exact_match": response.reward}))
    return result


def _config(folder: str, teacher: str, axes: dict[str, Any], **stage: Any) -> Any:
    from megatron_dgrpo.config.schema import Config

    model = {"dtype": "float64", "layout": axes}
    dgrpo = {
        "kind": "dgrpo",
        "data": {"path": "none"},
        "engine": "rollout",
        "steps": 1,
        "prompts_per_step": 4,
        "group_size": 5,
        "rewards": [{"kind": "exact_match"}],
        "sampling": {"max_tokens": 8, "temperature": 0.7},
        "optimizer": {"lr": 1e-2, "clip_grad": 1e6},
        "micro_batch_tokens": ROOM,
        "diagnostics_every": 1,
    }
    return Config.model_validate(
        {
            "run_dir": "none",
            "models": {"student": model | {"path": folder}, "teacher": model | {"path": teacher}},
            "student": "student",
            "teachers": [{"model": "teacher"}],
            "engines": {"rollout": {"model": "student", "max_model_len": 32}},
            "stages": [dgrpo | stage],
        }
    )


def _run(config: Any, groups: Any, student: Any, **more: Any) -> Any:
    """Without anything that generates, scores or keeps records."""
    from megatron_dgrpo.train.run import Run

    absent: dict[str, Any] = dict.fromkeys(("tokenizer", "store", "engines", "records", "journal"))
    return Run(config=config, groups=groups, student=student, shm_prefix="", **absent, **more)


def _updated(rank: int, world: int, folder: str, teacher: str, axes: dict[str, Any], cases: list[Any]) -> Any:
    """For each case (stage settings, chunks): what the loop reports, the gradient and the weights after it."""
    from megatron_dgrpo.algorithms.build import dgrpo_loss
    from megatron_dgrpo.algorithms.factors import Factors
    from megatron_dgrpo.observe.timers import Phases
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.dgrpo import _updates
    from megatron_dgrpo.train.options import load_run_student
    from megatron_dgrpo.train.tally import Tally
    from megatron_dgrpo.train.update import Gradients

    layout = Layout(**axes)
    groups = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp, cp=layout.cp)
    groups.seed(0)
    found = []
    run = None
    for settings, chunks in cases:
        config = _config(folder, teacher, axes, **settings)
        student = load_run_student(config, groups)
        loaded = run.load_teachers() if run is not None else None
        run = _run(config, groups, student, teacher_groups=(groups,), teachers=loaded)
        (stage,) = config.stages
        student.start_optimizer(stage.optimizer)
        tally, factors = Tally(stage, {}, run.teacher_names), Factors(stage.objective, dgrpo_loss(stage.objective)[0])
        (parts,) = _updates(run, stage, iter(chunks), tally, factors, 1, Phases())
        gradients, num_parts = Gradients(student), 0
        for work in parts:
            gradients.add(work)
            num_parts += 1
        metrics = tally.facts | gradients.finish(tally.scale)
        gather_data_parallel_gradients(student.wrapped)
        gradient = pieces(student.decoder, "main_grad")
        # the optimizer reads its own shard of the buffers, which the gathering left as it was
        metrics |= student.update()
        found.append((metrics, gradient, pieces(student.decoder, "data"), sorted(sum(tally.samples, ())), num_parts))
    return found


def _chunks(order: list[list[int]]) -> list[list[Trajectory]]:
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in _batch():
        groups.setdefault(trajectory.prompt_id, []).append(trajectory)
    return [[trajectory for group in chunk for trajectory in groups[str(group)]] for chunk in order]


def _same(periodic: Any, synchronous: Any) -> None:
    for of_one, of_other in zip(periodic, synchronous, strict=True):
        metrics, expected = of_one[0], of_other[0]
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("preflight/"):
                continue  # it looks at the first part
            limit = 1e-6 if name == "grad_norm" else WITHIN  # Megatron's norm is float32
            assert metrics[name] == pytest.approx(value, rel=limit, abs=1e-12), name
        assert of_one[3] == of_other[3]  # the same samples
    for part in (1, 2):  # the gradient, the weights
        found, wanted = (whole((rank[part] for rank in ranks), tolerance=WITHIN) for ranks in (periodic, synchronous))
        for name, tensor in wanted.items():
            assert relative_error(found[name], tensor) <= WITHIN, name
            assert tensor.norm() > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    student = save_tiny(folder / "student", tied=True, seed=1, layers=4, **SIZES)
    teacher = save_tiny(folder / "teacher", tied=False, hidden=96, layers=4, seed=2, **SIZES)
    return str(student), str(teacher)


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"tp": 2, "sequence_parallel": True},
        {"dp": 2, "pp": 2},
        {"cp": 2, "dp": 2},
    ],
    ids=str,
)
def test_an_update_out_of_parts_is_the_whole_batchs(folders: tuple[str, str], axes: dict[str, Any]) -> None:
    cases: list[Any] = []
    for aggregation in AGGREGATIONS:
        prompts = aggregation == "sequence_group_prompt_mean"
        for more in ({}, {"on_overlong": "drop", "micro_batch_tokens": SMALL}) if prompts or not axes else ({},):
            settings = more | {"objective": {"aggregation": aggregation, "beta": 0.5}}
            cases.append((settings, _chunks([[0, 1, 2, 3]])))
            chosen = CHUNKS.values() if prompts and not axes else [ONE_BY_ONE]
            cases += [(settings | {"schedule": "periodic"}, _chunks(order)) for order in chosen]
    ranks = run_distributed(_updated, Layout(**axes).world_size, *folders, axes, cases, timeout_s=300)
    synchronous: Any = None
    for number, (settings, chunks) in enumerate(cases):
        outcome = [rank[number] for rank in ranks]
        room = settings.get("micro_batch_tokens", ROOM)
        fitting = [[t for t in chunk if len(t.prompt_tokens) + len(t.response_tokens) <= room] for chunk in chunks]
        dropped = sum(map(len, chunks)) - sum(map(len, fitting))
        assert outcome[0][4] == sum(map(bool, fitting)), "a chunk of which nothing fits is no part; any other is"
        assert outcome[0][0].get("dropped", 0.0) == dropped and (dropped > 0) == ("on_overlong" in settings)
        if "schedule" in settings:
            _same(outcome, synchronous)
        else:
            synchronous = outcome


def _twice_reduced(rank: int, world: int, folder: str, teacher: str) -> float:
    """How far the gradient is off if every part is reduced for itself."""
    import torch

    from megatron_dgrpo.algorithms.build import dgrpo_loss
    from megatron_dgrpo.algorithms.factors import Factors
    from megatron_dgrpo.observe.timers import Phases
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.dgrpo import _updates
    from megatron_dgrpo.train.options import load_run_student
    from megatron_dgrpo.train.tally import Tally
    from megatron_dgrpo.train.update import Gradients

    groups = Groups(tp=1, dp=2)
    groups.seed(0)
    config = _config(folder, teacher, {"dp": 2}, schedule="periodic", objective={"beta": 0.0})
    student = load_run_student(config, groups)
    run = _run(config, groups, student)
    (stage,) = config.stages
    norms = []
    for early in (False, True):
        tally, factors = Tally(stage, {}), Factors(stage.objective, dgrpo_loss(stage.objective)[0])
        (parts,) = _updates(run, stage, iter(_chunks([[0, 1], [2, 3]])), tally, factors, 1, Phases())
        gradients = Gradients(student)
        for work in parts:
            gradients.add(work)
            if early:
                student.reduce_gradients()
        gradients.finish(tally.scale)
        norms.append(torch.cat([b.grad_data for part in student.wrapped for b in part.buffers]).norm().item())
    return abs(norms[1] / norms[0] - 1)


def test_reducing_every_part_would_be_seen(folders: tuple[str, str]) -> None:
    assert max(run_distributed(_twice_reduced, 2, *folders)) > 1e-2


def _of_two_passes() -> str:
    from megatron_dgrpo.algorithms.losses import Loss
    from megatron_dgrpo.algorithms.sequence_terms import SequenceSurrogate
    from megatron_dgrpo.errors import ObjectiveError
    from megatron_dgrpo.train import tally

    (stage,) = _config("none", "none", {}, schedule="periodic").stages
    tally.check_schedule(stage)
    tally.dgrpo_loss = lambda objective: (Loss((SequenceSurrogate(),)), {})  # type: ignore[attr-defined]
    (synchronous,) = _config("none", "none", {}).stages
    tally.check_schedule(synchronous)
    try:
        tally.check_schedule(stage)
    except ObjectiveError as error:
        return str(error)
    return ""


def test_terms_that_look_at_the_whole_batch_first_are_refused() -> None:
    said = run_forked(_of_two_passes)
    assert "must see every sequence of the batch" in said and "set schedule=synchronous" in said

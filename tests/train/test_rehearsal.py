"""The dry batch: as large as the settings allow, without a trace in the run, and an error where memory does not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_loop import _config as _loop_config
from test_static_update import _examples
from test_stopping import _hash, _run, _said
from test_update_parity import SIZES

from megatron_dgrpo.errors import CapacityError
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

LENGTH, RESPONSE, GROUP, ROOM = 24, 5, 3, 80
"""Of the longest sequence and response; a group's tree has 19 + 3 x 5 = 34 tokens, two of which fill a micro-batch."""


def _built(folder: str, teacher: str, axes: dict[str, Any], teacher_axes: dict[str, Any], **settings: Any) -> Any:
    """A run of one dgrpo stage on this rank, with its student if it has a part of it; and what it notes."""
    from megatron_dgrpo.config.schema import Config
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.options import load_run_student
    from megatron_dgrpo.train.run import Run

    model = {"dtype": "float32"}
    stage = {
        "kind": "dgrpo",
        "data": {"path": "none"},
        "engine": "rollout",
        "steps": 2,
        "prompts_per_step": 64,
        "group_size": GROUP,
        "sampling": {"max_tokens": RESPONSE},
        "rewards": [{"kind": "exact_match"}],
        "optimizer": {"lr": 1e-2},
        "micro_batch_tokens": ROOM,
    }
    engine = {"model": "student", "max_model_len": LENGTH, "kv_cache_bytes": 2**20}
    engine |= settings.pop("engine", {})
    config = Config.model_validate(
        {
            "run_dir": "none",
            "models": {
                "student": model | {"path": folder, "layout": axes},
                "teacher": model | {"path": teacher, "layout": teacher_axes},
            },
            "student": "student",
            "teachers": [{"model": "teacher"}],
            "engines": {"rollout": engine},
            "stages": [stage | settings],
        }
    )
    both = [Groups(**({"tp": 1, "dp": 1} | {k: v for k, v in a.items() if len(k) == 2})) for a in (axes, teacher_axes)]
    groups = both[0]
    (groups if groups.member else both[1]).seed(0)
    absent: dict[str, Any] = dict.fromkeys(("tokenizer", "store", "engines", "records", "journal"))
    student = load_run_student(config, groups) if groups.member else None
    run = Run(config=config, groups=groups, student=student, shm_prefix="", teacher_groups=(both[1],), **absent)
    notes: list[str] = []
    run.note = lambda words, **_: notes.append(words)  # type: ignore[method-assign]
    return run, config.stages[0], notes


class _Dry:
    """What the stage makes of a dry batch."""

    def __init__(self, run: Any, stage: Any) -> None:
        self._run, self._stage = run, stage
        self.sizes: list[int] = []

    def __call__(self, trajectories: Any) -> Any:
        from megatron_dgrpo.algorithms.build import dgrpo_loss
        from megatron_dgrpo.algorithms.factors import Factors
        from megatron_dgrpo.train.dgrpo import _work
        from megatron_dgrpo.train.tally import Tally

        stage = self._stage
        factors = Factors(stage.objective, dgrpo_loss(stage.objective)[0]).at(0)
        work = _work(self._run, stage, Tally(stage, {}, self._run.teacher_names), trajectories, factors, 1)
        self.sizes = [layout.num_tokens for layout in work.layouts]
        return work


def _updated(run: Any, stage: Any, number: int) -> dict[str, float]:
    """A real update; a teacher has no say in it, which needs no rank beside the student's."""
    from megatron_dgrpo.algorithms.build import sft_loss, sft_streams
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.train.update import Gradients, Work

    examples = _examples()[number:]
    loss, factors = sft_loss()
    layouts = run.micro_batches(trees(examples), stage.micro_batch_tokens)
    gradients = Gradients(run.student)
    gradients.add(Work(layouts, sft_streams(examples).streams, loss, factors, 1.0))
    return gradients.finish() | run.student.update()


def _trained(rank: int, world: int, *arguments: Any) -> Any:
    """Two updates, without a dry batch and with one before each: whether all bits are the same."""
    import torch

    from megatron_dgrpo.parallel.rng import random_states
    from megatron_dgrpo.train.rehearsal import rehearse

    found = []
    for dry in (False, True):
        run, stage, notes = _built(*arguments)
        run.load_teachers()
        if run.student is None:  # of the teacher alone
            for _ in range(2 if dry else 0):
                rehearse(run, stage, 0, None)
            continue
        run.student.start_optimizer(stage.optimizer, 2)
        make, metrics = _Dry(run, stage), []
        for number in range(2):
            if dry:
                rehearse(run, stage, 0, make)
            metrics.append(_updated(run, stage, number))
        inner = [one.optimizer for one in run.student.optimizer.chained_optimizers]
        moments = [value for one in inner for state in one.state.values() for value in state.values()]
        bits = [*run.student.decoder.parameters(), *moments, *random_states().values()]
        found.append((metrics, [tensor.detach().clone() for tensor in bits]))
    if not found:
        return None
    (metrics, bits), (dry_metrics, dry_bits) = found
    same = metrics == dry_metrics and all(torch.equal(a, b) for a, b in zip(bits, dry_bits, strict=True))
    return same, notes, make.sizes


@pytest.mark.parametrize(
    ("axes", "teacher_axes", "world"),
    [
        ({"tp": 2, "sequence_parallel": True}, {"dp": 2}, 2),
        ({"pp": 2}, {"tp": 2}, 2),
        ({"dp": 2}, {"tp": 2, "dp": 2}, 4),
    ],
    ids=str,
)
def test_it_is_full_and_leaves_nothing_behind(
    tmp_path: Path, axes: dict[str, Any], teacher_axes: dict[str, Any], world: int
) -> None:
    folder = save_tiny(tmp_path / "student", tied=True, seed=1, **SIZES)
    teacher = save_tiny(tmp_path / "teacher", tied=False, seed=2, hidden=96, **SIZES)
    ranks = run_distributed(_trained, world, str(folder), str(teacher), axes, teacher_axes)
    students = [found for found in ranks if found is not None]
    assert len(students) == 2
    for same, notes, sizes in students:
        assert same
        assert sizes == [68] * axes.get("pp", 1), "two trees of 34 tokens in each micro-batch"
        assert len(notes) == 2 and "(dgrpo): a batch of the greatest lengths fits: " in notes[0]
        groups = 2 * axes.get("pp", 1) * axes.get("dp", 1)
        assert f"{groups} x (a prompt of 19 tokens and 3 responses of 5)" in notes[0] and "GiB at most" in notes[0]


def _without_memory(rank: int, world: int, folder: str, teacher: str) -> str:
    import resource

    from megatron_dgrpo.train.rehearsal import rehearse

    large = {"engine": {"max_model_len": 60_000}, "micro_batch_tokens": 65_536}
    run, stage, _ = _built(folder, teacher, {}, {}, **large)
    run.student.start_optimizer(stage.optimizer, 1)
    run.load_teachers()
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, resource.RLIM_INFINITY))
    try:
        rehearse(run, stage, 0, _Dry(run, stage))
    except CapacityError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


def test_what_does_not_fit_names_sizes_and_settings(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "student", tied=True, seed=1, max_positions=2**20, **SIZES)
    teacher = save_tiny(tmp_path / "teacher", tied=True, seed=2, max_positions=2**20, **SIZES)
    (said,) = run_distributed(_without_memory, 1, str(folder), str(teacher))
    assert said.startswith("stage 0 (dgrpo): a batch of the greatest lengths does not fit into memory (rank 0, ")
    assert "1 x (a prompt of 59,995 tokens and 3 responses of 5)" in said and "micro-batches of 65,536 tokens" in said
    for setting in (
        "stages.0.micro_batch_tokens=65536",
        "engines.rollout.max_model_len=60000",
        "stages.0.group_size=3",
        "models.student.recompute=full",
        "stages.0.dry_batch=false",
    ):
        assert setting in said


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_is_the_same_to_the_bit_with_it_and_without(files: Path, tmp_path: Path) -> None:
    figures = {}
    for dry in (True, False):
        run_dir = tmp_path / str(dry)
        config = _loop_config(files, run_dir)
        config["rollout"] = {"deterministic": True}
        config["stages"] = [config["stages"][0], config["stages"][1] | {"steps": 2}]
        for stage in config["stages"]:
            stage["dry_batch"] = dry
        figures[dry] = _run(tmp_path, config)
    assert figures[True] == figures[False] and _hash(tmp_path / "True") == _hash(tmp_path / "False")
    static, rollouts = _said(tmp_path / "True", "memory")
    assert "stage 0 (sft): a batch of the greatest lengths fits: 8 x (a prompt of " in static
    assert (
        "4 x (a prompt of 28 tokens and 4 responses of 4), in micro-batches of up to 176 tokens (1 on rank 0)"
        in rollouts
    )
    assert _said(tmp_path / "False", "memory") == []

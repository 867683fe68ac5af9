"""What teachers have to say of an update's batch, and whether it arrives: the same for rollouts and for static data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dgrpo.config.schema import Stage
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.train.preflight import check_update
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.update import Work


def teach(run: Run, stage: Stage, work: Work, trajectories: Sequence[Trajectory]) -> Work:
    """With what the teachers say, where the objective has teachers."""
    if not stage.uses_teacher:
        return work
    return replace(work, lessons=run.load_teachers().teach(trajectories, run.packing(stage.micro_batch_tokens)))


def preflight(
    run: Run, stage: Stage, work: Work, factors: Mapping[str, float], trajectories: Sequence[Trajectory]
) -> dict[str, float]:
    """A teacher has the student's weights where both come from one folder and nothing was trained yet."""
    again = run.load_teachers().teach(trajectories, run.packing(stage.micro_batch_tokens))
    paths = {name: Path(run.config.models[name].path).resolve() for name in run.teacher_names}
    same = {name for name, path in paths.items() if run.version == 0 and path == Path(run.model.path).resolve()}
    return check_update(run.trained, work, again, factors, same_weights=same)

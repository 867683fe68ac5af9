"""The stages of a run as a rank goes through them that has a part of a teacher and none of the student."""

from __future__ import annotations

from megatron_dgrpo.config.schema import DGRPO, SFT
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import by_prompts
from megatron_dgrpo.train.collect import collect
from megatron_dgrpo.train.evaluation import evaluate
from megatron_dgrpo.train.run import Run


def assist(run: Run, stage: SFT | DGRPO, number: int) -> None:
    """It takes what rank 0 publishes, in the same order as all, and lets the teachers score it."""
    evaluate(run, number, 0)
    for step in range(1, stage.steps + 1):
        if isinstance(stage, DGRPO):
            trajectories = collect(
                run,
                stage.engine,
                (),
                sampling=stage.sampling,
                num_samples=stage.group_size,
                rewards=stage.rewards,
                seed=run.config.seed + number,
                step=step,
                phases=Phases(),
            )
            trajectories = run.fitting(trajectories, stage, {})
            shares = by_prompts(trajectories, stage.updates_per_batch) if stage.objective.uses_teacher else []
            if step == 1 and stage.preflight:
                shares += shares[:1]  # which the preflight has scored again
            for members in shares:
                run.load_teachers().teach(members, run.packing(stage.micro_batch_tokens))
        evaluate(run, number, step)

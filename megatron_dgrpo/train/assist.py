"""The stages of a run as a rank goes through them that has a part of a teacher and none of the student."""

from __future__ import annotations

from megatron_dgrpo.config.schema import DGRPO, SFT
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.train.chunks import chunks
from megatron_dgrpo.train.evaluation import evaluate
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.tally import shares


def assist(run: Run, stage: SFT | DGRPO, number: int) -> None:
    """It takes what rank 0 publishes, in the same order as all, and lets the teachers score it."""
    evaluate(run, number, 0)
    for step in range(1, stage.steps + 1):
        if isinstance(stage, DGRPO):
            preflight = step == 1 and stage.preflight
            for chunk in chunks(run, stage, number, step, (), Phases()):
                parts = shares(run, stage, chunk, {}) if stage.objective.uses_teacher else []
                if preflight and parts:  # which has the first share scored again
                    parts, preflight = [*parts, parts[0]], False
                for members in parts:
                    run.load_teachers().teach(members, run.packing(stage.micro_batch_tokens))
        evaluate(run, number, step)

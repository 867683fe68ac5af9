"""The stages of a run as a rank goes through them that has a part of a teacher and none of the student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from megatron_dgrpo.config.schema import KD, OnPolicy, Stage, Static
from megatron_dgrpo.data.dataset import PromptSource
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.train.chunks import chunks
from megatron_dgrpo.train.rehearsal import rehearse
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.saving import Kept, Progress
from megatron_dgrpo.train.static import next_examples
from megatron_dgrpo.train.tally import shares


def assist(run: Run, stage: Stage, number: int, progress: Progress) -> None:
    """It goes through the same steps as all, and lets the teachers score what each trains on."""
    rows = run.prompts(stage, number) if isinstance(stage, Static) and stage.uses_teacher else None
    kept: dict[str, Kept] = {"data": rows} if rows is not None else {}
    for step in progress.steps(number, kept, partial(rehearse, run, stage, number, None)):
        preflight = step == 1 and _preflights(stage)
        for parts in _parts(run, stage, number, step, rows):
            if preflight and parts:  # which has the first share scored again, after all of its chunk
                parts, preflight = [*parts, parts[0]], False
            for members in parts:
                run.load_teachers().teach(members, run.packing(stage.micro_batch_tokens))


def _preflights(stage: Stage) -> bool:
    return stage.preflights if isinstance(stage, OnPolicy | KD) else False


def _parts(
    run: Run, stage: Stage, number: int, step: int, rows: PromptSource | None
) -> Iterator[Sequence[Sequence[Trajectory]]]:
    """What a step trains on, in shares, chunk by chunk: of rollouts what rank 0 publishes, of static data what every
    rank reads by itself."""
    if isinstance(stage, OnPolicy):
        for chunk in chunks(run, stage, number, step, None, Phases()):
            yield shares(run, stage, chunk, {}) if stage.uses_teacher else []
    elif isinstance(stage, Static) and rows is not None:
        yield [next_examples(run, stage, rows)[0]]

"""A step's trajectories, chunk by chunk, on every rank: how generating and training follow each other.

`synchronous` has one chunk, the whole batch, in the order of its prompts. `periodic` has a chunk whenever some groups
have ended: a thread of rank 0 (`feed`) takes and scores the engine's answers while its main thread trains.

All ranks must train on the same chunks. Rank 0 alone knows what has ended: it publishes each chunk in the store, and
the others wait for it there with a deadline, never in a collective. A chunk also says whether it is the last one. It
is in the journal, synced, before it is published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_dgrpo import points
from megatron_dgrpo.config.schema import OnPolicy, Periodic
from megatron_dgrpo.data.dataset import PromptRow
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.rollout.journal import Began, Further
from megatron_dgrpo.rollout.messages import Chunk, Group
from megatron_dgrpo.train.collect import Asked, patience_s, scored_groups
from megatron_dgrpo.train.feed import Feed
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.selection import Selection, rounds


def chunks(
    run: Run, stage: OnPolicy, number: int, step: int, selection: Selection | None, phases: Phases
) -> Iterator[list[Trajectory]]:
    """The step's trajectories, whole groups at a time. Rank 0 selects what is asked for; the others need no
    selection."""
    source = None
    patience = patience_s(run, stage.engine) * rounds(stage)
    if run.journal is not None:
        assert selection is not None
        asked = Asked(
            stage.engine,
            selection.first(),
            stage.sampling,
            num_samples=stage.group_size,
            rewards=stage.rewards,
            seed=run.config.seed + number,
            step=step,
        )
        prompt_ids = tuple(row.name for row in asked.rows)
        began = Began(number, step, run.version, prompt_ids, asked.num_samples, stage.updates_per_step)
        run.journal.begin(began)
        source = _source(run, stage, asked, selection, phases)
    last = False
    while not last:
        with phases("generate"):
            mine = None
            if source is not None and run.waiting is not None:
                with run.waiting():
                    mine = next(source)
            chunk = run.share(mine, patience)
        points.reached("step.chunk")
        last = chunk.last
        yield [trajectory for group in chunk.groups for trajectory in group.trajectories]


def _source(run: Run, stage: OnPolicy, asked: Asked, selection: Selection, phases: Phases) -> Iterator[Chunk]:
    """Rank 0's chunks, each of them safe in the journal."""
    journal, schedule = run.journal, stage.schedule
    assert journal is not None
    if not isinstance(schedule, Periodic):
        num_asked = num_skipped = 0

        def generate(rows: Sequence[PromptRow]) -> list[Group]:
            nonlocal num_asked, num_skipped
            if rows is not asked.rows:
                journal.further(Further(tuple(row.name for row in rows)))
            these = replace(asked, rows=rows, asked_before=num_asked, skipped_before=num_skipped)
            num_asked += len(rows)
            groups = []
            for group in scored_groups(run, these, phases):
                num_skipped += not group.responses
                journal.append(group)
                groups.append(selection.see(group))
            return groups

        groups = selection.batch(asked.rows, generate)
        journal.sync()
        selection.done()
        yield Chunk(selection.in_order(groups), last=True)
        return
    asked = replace(asked, what="")  # the board is the main thread's
    feed = Feed(scored_groups(run, asked, Phases()), len(asked.rows), journal, in_memory=schedule.groups_in_memory)
    last = False
    while not last:
        groups, last = feed.take(schedule.chunk_groups, patience_s(run, stage.engine))
        journal.sync()
        for group in groups:
            selection.see(group)
        if last:
            selection.done()
        yield Chunk(selection.in_order(groups), last)

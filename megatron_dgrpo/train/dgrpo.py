"""The stages of rollouts, dGRPO and its parts GRPO and OPD: generate, score, pack, teach, train, sync."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from megatron_dgrpo import points
from megatron_dgrpo.algorithms.build import dgrpo_loss, head_options
from megatron_dgrpo.algorithms.factors import Factors
from megatron_dgrpo.algorithms.mismatch import check_mismatch
from megatron_dgrpo.config.objective import Rewarded
from megatron_dgrpo.config.schema import OnPolicy, Periodic
from megatron_dgrpo.config.stages import shaping_note
from megatron_dgrpo.observe.silence import SilentSteps
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.packing.trees import name_of, trees
from megatron_dgrpo.rollout.journal import Trained
from megatron_dgrpo.train.chunks import chunks
from megatron_dgrpo.train.nonfinite import Guard
from megatron_dgrpo.train.rehearsal import rehearse
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.saving import Kept, Progress
from megatron_dgrpo.train.selection import Selection
from megatron_dgrpo.train.tally import Tally, check_schedule
from megatron_dgrpo.train.teaching import preflight, teach
from megatron_dgrpo.train.update import Gradients, Work, old_logprobs


def run_dgrpo(run: Run, stage: OnPolicy, number: int, progress: Progress) -> None:
    student = run.trained
    check_schedule(stage)
    prompts = run.prompts(stage, number)
    selection = Selection(stage, prompts)
    factors = Factors(stage.objective, dgrpo_loss(stage.objective)[0])
    rewarded = isinstance(stage.objective, Rewarded)
    guard = Guard(run, stage, number)
    silent = SilentSteps(rewarded=any(reward.weight for reward in stage.rewards)) if rewarded else None
    student.start_optimizer(stage.optimizer, stage.num_updates)
    if note := shaping_note(stage):
        run.note(note)
    kept: dict[str, Kept] = {"data": prompts, "factors": factors, "guard": guard, "selection": selection}
    if silent:
        kept["silent"] = silent

    def dry_work(trajectories: Sequence[Trajectory]) -> Work:
        dry_tally = Tally(stage, {}, run.teacher_names if stage.uses_teacher else ())
        return _work(run, stage, dry_tally, trajectories, factors.at(0), 1)

    for step in progress.steps(number, kept, partial(rehearse, run, stage, number, dry_work)):
        run.begin(number, step)
        phases = Phases()
        with phases("sync"):
            run.sync(stage.engine)
        tally = Tally(stage, {}, run.teacher_names if stage.uses_teacher else ())
        generated = chunks(run, stage, number, step, selection, phases)
        updates = _updates(run, stage, generated, tally, factors, step, phases)
        seen: list[dict[str, float]] = []
        for update, parts in enumerate(updates, 1):
            gradients = Gradients(student)
            for work in parts:
                with phases("train"):
                    gradients.add(work)
                points.reached("step.part")
            metrics: dict[str, float] = {}
            with phases("train"), guard(gradients, parts if isinstance(parts, list) else None, step, update):
                found = gradients.finish(tally.scale)
                if warning := check_mismatch(stage.mismatch, found, f"stages.{number}"):
                    run.note(f"step {step}, update {update}: {warning}", kind="mismatch", level="warning")
                metrics = found | student.update()  # nothing of an update that is skipped
                run.version += 1
                points.reached("step.update")
                if run.journal is not None:
                    run.journal.trained(Trained(update, run.version, tally.samples_of(update)))
                    points.reached("step.journal")
            seen += [metrics] if metrics else []
            tally.facts |= {f"reward/{name}": count for name, count in run.reward_failures().items()}
            last = update == len(updates)
            facts = tally.facts | selection.facts | guard.facts
            run.report(number, step, facts | metrics, update=update, phases=phases if last else None)
        if silent and (words := silent.observe(tally.facts, factors.at(step - 1))):
            run.note(words, kind="silence", level="warning")
        if seen:
            factors.observe({name: float(np.mean([m[name] for m in seen if name in m])) for name in seen[-1]})


def _updates(
    run: Run,
    stage: OnPolicy,
    generated: Iterator[list[Trajectory]],
    tally: Tally,
    factors: Factors,
    step: int,
    phases: Phases,
) -> Sequence[Iterable[Work]]:
    """The step's updates, and the parts of the batch that each is made of: those of the periodic schedule are made
    while it trains on them, the others before the first update."""
    parts = (
        work for chunk in generated for work in _prepared(run, stage, chunk, tally, factors.at(step - 1), step, phases)
    )
    if isinstance(stage.schedule, Periodic):
        return [parts]
    works = list(parts)
    if len(works) * stage.epochs_per_batch > 1:  # the later updates need the log-probs that the batch began with
        with phases("train"):
            works = [replace(work, streams=old_logprobs(run.trained, work)) for work in works]
    return [[work] for _ in range(stage.epochs_per_batch) for work in works]


def _prepared(
    run: Run,
    stage: OnPolicy,
    chunk: Sequence[Trajectory],
    tally: Tally,
    factors: dict[str, float],
    step: int,
    phases: Phases,
) -> list[Work]:
    """What to train on of a chunk, packed and taught."""
    first = not any(tally.samples)
    run.rest(stage.engine)
    with phases("pack"):
        shares = tally.shares(run, chunk)
        work = [_work(run, stage, tally, members, factors, step) for members in shares]
    with phases("teach"):
        work = [teach(run, stage, item, members) for item, members in zip(work, shares, strict=True)]
    if first and work and step == 1 and stage.preflights:
        with phases("preflight"):
            tally.facts |= preflight(run, stage, work[0], factors, shares[0])
    return work


def _work(
    run: Run, stage: OnPolicy, tally: Tally, trajectories: Sequence[Trajectory], factors: dict[str, float], step: int
) -> Work:
    """This rank's micro-batches of one part of the batch, and the streams of all of it."""
    layouts = run.micro_batches(trees(trajectories), stage.micro_batch_tokens)
    loss, _ = dgrpo_loss(stage.objective)
    return Work(
        layouts,
        tally.streams(trajectories),
        loss,
        factors,
        stage.sampling.temperature,
        head_options=head_options(stage.objective),
        names=[name_of(trajectory) for trajectory in trajectories],
        balance=stage.diagnostics_every > 0 and (step - 1) % stage.diagnostics_every == 0,
    )

"""The dGRPO stage: generate, score, pack, teach, train, sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams, head_options
from megatron_dgrpo.algorithms.factors import Factors
from megatron_dgrpo.algorithms.mismatch import check_mismatch
from megatron_dgrpo.config.schema import DGRPO
from megatron_dgrpo.config.stages import shaping_note
from megatron_dgrpo.observe.silence import SilentSteps
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Trajectory, by_prompts
from megatron_dgrpo.packing.trees import trees
from megatron_dgrpo.train.collect import collect, totals
from megatron_dgrpo.train.evaluation import evaluate
from megatron_dgrpo.train.preflight import check_update
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.update import Work, compute_gradients, old_logprobs


def run_dgrpo(run: Run, stage: DGRPO, number: int) -> None:
    student = run.trained
    prompts = run.prompts(stage, number)
    factors = Factors(stage.objective, dgrpo_loss(stage.objective)[0])
    silent = SilentSteps()
    student.start_optimizer(stage.optimizer)
    if note := shaping_note(stage):
        run.note(note)
    evaluate(run, number, 0)
    for step in range(1, stage.steps + 1):
        run.begin(number, step)
        phases = Phases()
        with phases("sync"):
            run.sync(stage.engine)
        trajectories = collect(
            run,
            stage.engine,
            prompts.take(stage.prompts_per_step),
            sampling=stage.sampling,
            num_samples=stage.group_size,
            rewards=stage.rewards,
            seed=run.config.seed + number,
            step=step,
            phases=phases,
        )
        facts = _facts(trajectories, totals(trajectories, stage.rewards)) | prompts.facts()
        with phases("pack"):
            trajectories = run.fitting(trajectories, stage, facts)
            shares = by_prompts(trajectories, stage.updates_per_batch)
            work = [_work(run, stage, members, facts, factors.at(step - 1), step) for members in shares]
        with phases("teach"):
            work = [_teach(run, stage, item, members) for item, members in zip(work, shares, strict=True)]
        if step == 1 and stage.preflight and stage.objective.uses_teacher:
            with phases("preflight"):
                facts |= _preflight(run, stage, work[0], factors.at(0), shares[0])
        with phases("train"):
            seen: list[dict[str, float]] = []
            if len(work) > 1:  # the later updates need the log-probs that the batch began with
                work = [replace(item, streams=old_logprobs(student, item)) for item in work]
            for update, item in enumerate(work, 1):
                metrics = compute_gradients(student, item)
                if warning := check_mismatch(stage.mismatch, metrics, f"stages.{number}"):
                    run.note(f"step {step}, update {update}: {warning}")
                metrics |= student.update()
                seen.append(metrics)
                run.version += 1
                last = update == len(work)
                run.report(number, step, facts | metrics, update=update, phases=phases if last else None)
        if words := silent.observe(facts, factors.at(step - 1)):
            run.note(words, kind="silence", level="warning")
        factors.observe({name: float(np.mean([m[name] for m in seen if name in m])) for name in seen[-1]})
        evaluate(run, number, step)


def _work(
    run: Run,
    stage: DGRPO,
    trajectories: Sequence[Trajectory],
    facts: dict[str, float],
    factors: dict[str, float],
    step: int,
) -> Work:
    """This rank's micro-batches of one update, and the streams of all of it."""
    batch = dgrpo_streams(trajectories, totals(trajectories, stage.rewards), stage.objective)
    for name, value in batch.facts.items():
        facts[name] = facts.get(name, 0.0) + value
    layouts = run.micro_batches(trees(trajectories), stage.micro_batch_tokens)
    loss, _ = dgrpo_loss(stage.objective)
    return Work(
        layouts,
        batch.streams,
        loss,
        factors,
        stage.sampling.temperature,
        head_options=head_options(stage.objective),
        balance=stage.diagnostics_every > 0 and (step - 1) % stage.diagnostics_every == 0,
    )


def _teach(run: Run, stage: DGRPO, work: Work, trajectories: Sequence[Trajectory]) -> Work:
    """With the teacher's rows, where the objective has a teacher."""
    if not stage.objective.uses_teacher:
        return work
    teacher = run.load_teacher()
    rows = teacher.rows(trees(trajectories), run.packing(stage.micro_batch_tokens))
    return replace(work, teacher_head=teacher.head, teacher_rows=rows)


def _preflight(
    run: Run, stage: DGRPO, work: Work, factors: dict[str, float], trajectories: Sequence[Trajectory]
) -> dict[str, float]:
    """The teacher has the student's weights where both come from one folder and nothing was trained yet."""
    again = run.load_teacher().rows(trees(trajectories), run.packing(stage.micro_batch_tokens))
    teacher = run.config.models[run.config.teachers[0].model]
    same = run.version == 0 and Path(teacher.path).resolve() == Path(run.model.path).resolve()
    return check_update(run.trained, work, again, factors, same_weights=same)


def _facts(trajectories: Sequence[Trajectory], totals_B: np.ndarray) -> dict[str, float]:
    lengths = np.asarray([t.num_loss_tokens for t in trajectories])
    return {
        "reward/mean": float(totals_B.mean()),
        "reward/std": float(totals_B.std()),
        "response/length": float(lengths.mean()),
        "response/truncated": float(np.mean([t.finish_reason == "length" for t in trajectories])),
        "tokens": float(lengths.sum() + sum(len(t.prompt_tokens) for t in trajectories)),
    }

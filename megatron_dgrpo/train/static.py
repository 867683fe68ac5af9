"""The stages of static data, SFT and KD: likelihood of the data's answers, and a teacher's word on their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_dgrpo import points
from megatron_dgrpo.algorithms.build import dgrpo_loss, head_options, sft_loss, static_streams
from megatron_dgrpo.algorithms.factors import Factors
from megatron_dgrpo.algorithms.losses import Loss
from megatron_dgrpo.config.schema import KD, Static
from megatron_dgrpo.data.dataset import PromptSource
from megatron_dgrpo.data.supervised import example
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.packing.trees import documents, name_of, trees
from megatron_dgrpo.train.nonfinite import Guard
from megatron_dgrpo.train.rehearsal import rehearse
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.saving import Kept, Progress
from megatron_dgrpo.train.teaching import preflight, teach
from megatron_dgrpo.train.update import Gradients, Work


def run_static(run: Run, stage: Static, number: int, progress: Progress) -> None:
    rows = run.prompts(stage, number)
    student = run.trained
    factors = Factors(stage.objective, dgrpo_loss(stage.objective)[0]) if isinstance(stage, KD) else None
    student.start_optimizer(stage.optimizer, stage.num_updates)
    guard = Guard(run, stage, number)
    kept: dict[str, Kept] = {"data": rows, "guard": guard}
    if factors:
        kept["factors"] = factors

    def dry_work(examples: Sequence[Trajectory]) -> Work:
        return _work(run, stage, examples, factors.at(0) if factors else {}, 1)[0]

    for step in progress.steps(number, kept, partial(rehearse, run, stage, number, dry_work)):
        run.begin(number, step)
        phases = Phases()
        with phases("pack"):
            examples, facts = next_examples(run, stage, rows)
            work, more = _work(run, stage, examples, factors.at(step - 1) if factors else {}, step)
            facts |= more
        if stage.uses_teacher:
            with phases("teach"):
                work = teach(run, stage, work, examples)
            if step == 1 and isinstance(stage, KD) and stage.preflights:
                with phases("preflight"):
                    facts |= preflight(run, stage, work, work.factors, examples)
        metrics: dict[str, float] = {}
        with phases("train"):
            gradients = Gradients(student)
            gradients.add(work)
            with guard(gradients, [work], step):
                found = gradients.finish()
                metrics = found | student.update()  # nothing of an update that is skipped
                run.version += 1
                points.reached("step.update")
        run.report(number, step, facts | guard.facts | metrics, phases=phases)


def next_examples(run: Run, stage: Static, rows: PromptSource) -> tuple[list[Trajectory], dict[str, float]]:
    """A step's examples that fit, and what there is to say of them; the same on every rank of the world."""
    if stage.batch_tokens is not None:
        taken = rows.take_tokens(stage.batch_tokens)
    else:
        assert stage.batch_size is not None
        taken = rows.take(stage.batch_size)
    examples, facts = [example(row, run.tokenizer) for row in taken], rows.facts()
    examples = run.fitting(examples, stage, facts)
    tokens = float(sum(len(e.prompt_tokens) + e.num_loss_tokens for e in examples))
    return examples, facts | {"examples": float(len(examples)), "tokens": tokens}


def _work(
    run: Run, stage: Static, examples: Sequence[Trajectory], factors: dict[str, float], step: int
) -> tuple[Work, dict[str, float]]:
    """This rank's micro-batches, the streams of the whole batch, and its figures. A teacher scores trees."""
    loss = static_loss(stage)
    names, samples = [term.name for term in loss.terms], [name_of(e) for e in examples]
    grown = trees(examples) if stage.uses_teacher else documents(examples)
    layouts = run.micro_batches(grown, stage.micro_batch_tokens)
    if not isinstance(stage, KD):
        batch = static_streams(examples, names)
        return Work(layouts, batch.streams, loss, sft_loss()[1], temperature=1.0, names=samples), batch.facts
    batch = static_streams(examples, names, stage.objective.aggregation, run.teacher_names)
    options = head_options(stage.objective)
    work = Work(layouts, batch.streams, loss, factors, 1.0, head_options=options, names=samples)
    every = stage.diagnostics_every
    return replace(work, balance=every > 0 and (step - 1) % every == 0), batch.facts


def static_loss(stage: Static) -> Loss:
    return (dgrpo_loss(stage.objective) if isinstance(stage, KD) else sft_loss())[0]

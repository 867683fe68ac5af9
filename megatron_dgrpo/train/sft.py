"""The SFT stage: negative log-likelihood of the answers."""

from __future__ import annotations

from megatron_dgrpo.algorithms.build import sft_loss, sft_streams
from megatron_dgrpo.config.schema import SFT
from megatron_dgrpo.data.supervised import example
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trees import documents
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.saving import Progress
from megatron_dgrpo.train.update import Work, compute_gradients


def run_sft(run: Run, stage: SFT, number: int, progress: Progress) -> None:
    rows = run.prompts(stage, number)
    student = run.trained
    loss, factors = sft_loss()
    student.start_optimizer(stage.optimizer)
    for step in progress.steps(number, {"data": rows}):
        run.begin(number, step)
        phases = Phases()
        with phases("pack"):
            examples = [example(row, run.tokenizer) for row in rows.take(stage.batch_size)]
            facts = rows.facts()
            examples = run.fitting(examples, stage, facts)
            batch = sft_streams(examples)
            layouts = run.micro_batches(documents(examples), stage.micro_batch_tokens)
        with phases("train"):
            work = Work(layouts, batch.streams, loss, factors, temperature=1.0)
            metrics = compute_gradients(student, work) | student.update()
            run.version += 1
        tokens = float(sum(len(e.prompt_tokens) + e.num_loss_tokens for e in examples))
        run.report(number, step, facts | batch.facts | {"tokens": tokens} | metrics, phases=phases)

"""What stages and the evaluation ask for, and whether the numbers in it agree: batches, lengths, rewards.

A micro-batch is padded to a multiple of its layout's padding unit, and may not be longer than `micro_batch_tokens` with
that: its room is `micro_batch_tokens` rounded down. The student and the teacher pack the same sequences, each with its
own unit, so that a sequence must fit into the smaller of two rooms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_dgrpo.config.mismatch import problems as mismatch_problems
from megatron_dgrpo.config.objective import Taught
from megatron_dgrpo.config.objective import problems as objective_problems
from megatron_dgrpo.config.optimizer import problems as optimizer_problems
from megatron_dgrpo.config.overlong import Penalise
from megatron_dgrpo.config.reward_rules import reward_problems
from megatron_dgrpo.config.rewards import Referenced
from megatron_dgrpo.config.schema import (
    DGRPO,
    GRPO,
    KD,
    OPD,
    AnyStage,
    Config,
    Evaluation,
    Model,
    OnPolicy,
    Periodic,
    Selective,
    Static,
)
from megatron_dgrpo.config.selection import problems as selection_problems

FP8 = Literal["tensorwise", "blockwise", "mxfp8"]
"""Scales per tensor (from its current values), per block of 128 x 128 or 1 x 128, per run of 32 (Blackwell)."""
_FP8_UNIT: dict[FP8, int] = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def rollout_stages(config: Config) -> list[tuple[str, DGRPO | GRPO | OPD]]:
    """Dotted path and stage, of those that learn from rollouts."""
    return [(f"stages.{i}", stage) for i, stage in enumerate(config.stages) if isinstance(stage, OnPolicy)]


def taught_stages(config: Config) -> list[tuple[str, AnyStage]]:
    """Dotted path and stage, of those that have a teacher."""
    return [(f"stages.{i}", stage) for i, stage in enumerate(config.stages) if stage.uses_teacher]


def samplers(config: Config) -> list[tuple[str, DGRPO | GRPO | OPD | Evaluation]]:
    """Dotted path and section of everything that asks an engine for responses."""
    found: list[tuple[str, DGRPO | GRPO | OPD | Evaluation]] = list(rollout_stages(config))
    return found + ([("evaluation", config.evaluation)] if config.evaluation else [])


def padding_unit(*, tp: int, sequence_parallel: bool = False, fp8: FP8 | None = None) -> int:
    """The number of a micro-batch's tokens on one rank of a context-parallel group is a multiple of this.

    Sequence parallelism cuts them into equal parts, and every part of FP8 training is cut into whole blocks: FP8
    products contract over tokens when they form a weight's gradient.
    """
    return (tp if sequence_parallel else 1) * (_FP8_UNIT[fp8] if fp8 else 1)


def micro_batch_room(config: Config, number: int) -> int:
    """The longest sequence that a stage's micro-batches hold."""
    stage = config.stages[number]
    return min(stage.micro_batch_tokens // unit * unit for unit in _units(config, number))


def _units(config: Config, number: int) -> list[int]:
    """Padding units of the models that pack a stage's sequences; names of no model are another rule's to tell."""
    stage = config.stages[number]
    names = [config.student]
    if stage.uses_teacher:
        names += [teacher.model for teacher in config.teachers]
    return [_unit(config.models[name]) for name in names if name in config.models] or [1]


def _unit(model: Model) -> int:
    layout = model.layout
    return padding_unit(tp=layout.tp, sequence_parallel=layout.sequence_parallel, fp8=model.fp8)


# ---- Rules -----------------------------------------------------------------------------------------------------------


def rewards(config: Config) -> Iterator[str]:
    for path, section in samplers(config):
        labels = [reward.label for reward in section.rewards]
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            yield (
                f"{path}.rewards: {labels.count(label)} are called {label!r}; give each a name of its own "
                f"({path}.rewards.N.name), or list it once with the sum of the weights"
            )
        bare = [s.where for s in section.data.sources if s.messages is None and s.answer is None]
        for i, reward in enumerate(section.rewards):
            if bare and isinstance(reward, Referenced) and reward.reads_reference:
                yield (
                    f"{path}.rewards.{i}.reference: {reward.label} compares with the answer, and {bare[0]} has none: "
                    "name the data's field of answers, or the field to compare with"
                )
            if isinstance(section, OPD) and reward.weight != 1:
                yield (
                    f"{path}.rewards.{i}.weight: {reward.weight:g}, and an opd stage reports rewards and learns from "
                    "none; remove it, or make the stage one of kind dgrpo"
                )
            yield from (f"{path}.rewards.{i}.{problem}" for problem in reward_problems(reward))


def teachers(config: Config) -> Iterator[str]:
    names = [teacher.model for teacher in config.teachers]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"teachers: {name!r} is listed {names.count(name)} times; list it once"
    taught = [path for path, _ in taught_stages(config)]
    for path, stage in taught_stages(config):
        if not names:
            alone = f", or set {path}.objective.beta=0 for GRPO alone" if isinstance(stage, DGRPO) else ""
            yield f"{path}.objective.beta: the KL needs a teacher; add teachers: [{{model: NAME}}]{alone}"
    for i, stage in enumerate(config.stages):
        path, routed = f"stages.{i}", [source.teacher is not None for source in stage.data.sources]
        if path in taught and len(set(names)) > 1 and not all(routed):
            yield (
                f"{path}.data.teacher: {len(set(names))} teachers are listed, and nothing says which of them scores a "
                f"row; set {path}.data.teacher to the field with the name of its teacher's model, or keep one teacher"
            )
        elif path not in taught and any(routed):
            raised = f", or set {path}.objective.beta above 0" if isinstance(stage, DGRPO) else ""
            yield f"{path}.data.teacher: this stage has no teacher; remove it{raised}"
    if names and not taught:
        has_beta = any(isinstance(stage, DGRPO) for stage in config.stages)
        why = "every dgrpo stage has objective.beta 0" if has_beta else "there is no dgrpo, opd or kd stage"
        yield f"teachers: listed, but no stage uses one ({why}); set teachers=[] or an objective.beta above 0"
    for path, rollouts in rollout_stages(config):
        if isinstance(rollouts, DGRPO | GRPO) and not any(reward.weight for reward in rollouts.rewards):
            if isinstance(rollouts, GRPO):
                yield f"{path}: all rewards have weight 0, so that nothing is learnt; give a reward a weight"
            elif not rollouts.uses_teacher:
                yield (
                    f"{path}: all rewards have weight 0 and objective.beta is 0, so that nothing is learnt; "
                    "give a reward a weight, or beta a value above 0"
                )


def objectives(config: Config) -> Iterator[str]:
    for i, stage in enumerate(config.stages):
        path = f"stages.{i}"
        if isinstance(stage, OnPolicy | KD):
            yield from (f"{path}.objective.{problem}" for problem in objective_problems(stage.objective))
        if isinstance(stage, OnPolicy):
            overlong, longest = stage.objective.overlong, stage.sampling.max_tokens
            if isinstance(overlong, Penalise) and overlong.cache > longest:
                yield (
                    f"{path}.objective.overlong.cache: {overlong.cache} tokens are more than sampling.max_tokens="
                    f"{longest}; lower it (a fifth of max_tokens is usual)"
                )
            yield from (f"{path}.mismatch.{problem}" for problem in mismatch_problems(stage.mismatch))


def optimizers(config: Config) -> Iterator[str]:
    for i, stage in enumerate(config.stages):
        num_updates = None if isinstance(stage, Static) and stage.epochs is not None else stage.num_updates
        yield from (f"stages.{i}.optimizer.{found}" for found in optimizer_problems(stage.optimizer, num_updates))
        student = config.models.get(config.student)
        if stage.optimizer.precision_aware is not None and student is not None and student.dtype != "bfloat16":
            yield (
                f"stages.{i}.optimizer.precision_aware: master weights of their own are for models in bfloat16; set "
                f"models.{config.student}.dtype=bfloat16, or stages.{i}.optimizer.precision_aware=null"
            )


def batches(config: Config) -> Iterator[str]:
    for i, any_stage in enumerate(config.stages):
        if isinstance(any_stage, Static):
            yield from (f"stages.{i}.{problem}" for problem in _static_batches(any_stage))
    for path, stage in rollout_stages(config):
        prompts, updates = stage.prompts_per_step, stage.updates_per_batch
        if prompts % updates:
            fitting = max(n for n in range(1, min(prompts, updates) + 1) if prompts % n == 0)
            yield (
                f"{path}.updates_per_batch: {updates} updates cannot share {prompts} prompts equally; set "
                f"{path}.updates_per_batch={fitting} or {path}.prompts_per_step={-(-prompts // updates) * updates}"
            )
    for i, any_stage in enumerate(config.stages):
        if micro_batch_room(config, i) < 2:
            yield (
                f"stages.{i}.micro_batch_tokens: {any_stage.micro_batch_tokens} {_rounded(config, i)}hold no sequence, "
                "which has at least a prompt's and a response's token; set it to the longest sequence at least"
            )


def _static_batches(stage: Static) -> Iterator[str]:
    if stage.batch_size is None and stage.batch_tokens is None:
        yield "batch_size: missing; add it (Examples a step), or batch_tokens"
    if stage.batch_size is not None and stage.batch_tokens is not None:
        yield "batch_tokens: batch_size says how large a batch is, too; keep one of the two"
    if stage.epochs is None:
        if "steps" not in stage.model_fields_set:
            yield "steps: missing; add it (Batches to train on), or epochs"
        return
    if stage.steps:
        yield "epochs: steps says how long the stage is, too; keep one of the two"
    if stage.data.mixture:
        yield "epochs: sources of a mixture end at different times; set steps"
    elif stage.data.streaming:
        yield "epochs: a stream has no length that is known; set steps"


def shaping(config: Config) -> Iterator[str]:
    """Tokens of a truncated or penalised distribution, and an objective over the whole one."""
    for path, stage in rollout_stages(config):
        if not isinstance(stage.objective, Taught):
            continue
        estimator = stage.objective.estimator
        whole = estimator.kind in ("exact", "topk_student", "topk_teacher") or getattr(estimator, "baseline", False)
        if stage.sampling.shapes and stage.objective.uses_teacher and whole:
            name = "the sampled estimator's baseline" if estimator.kind == "sampled" else f"estimator {estimator.kind}"
            yield (
                f"{path}.sampling: {', '.join(stage.sampling.shapes)} changes the distribution that the engine samples "
                f"from, and {name} is over the student's own, which has no such mask; remove it (evaluations may have "
                f"it), or set {path}.objective.estimator=sampled or k2"
                + (f", or {path}.objective.beta=0" if isinstance(stage, DGRPO) else "")
            )
    for name, engine in config.engines.items():
        if engine.chunked_prefill is not None and engine.chunked_prefill < engine.max_num_seqs:
            yield (
                f"engines.{name}.chunked_prefill: a step of {engine.chunked_prefill} tokens has no place for each of "
                f"max_num_seqs={engine.max_num_seqs} sequences; set engines.{name}.chunked_prefill="
                f"{engine.max_num_seqs} or more, or lower max_num_seqs"
            )


def shaping_note(stage: OnPolicy) -> str:
    """What a stage that samples from another distribution should know of its figures; nothing for the others."""
    if not stage.sampling.shapes:
        return ""
    return (
        f"sampling with {', '.join(stage.sampling.shapes)}: the engine's log-probs are those of that distribution, the "
        "trainer's those of the whole one under the temperature. So mismatch/* has the difference in it (mean ratio = "
        "the probability of what is kept), a correction weighs by it, and the policy's entropy is that of the whole"
    )


def schedules(config: Config) -> Iterator[str]:
    for path, stage in rollout_stages(config):
        schedule = stage.schedule
        if not isinstance(schedule, Periodic):
            continue
        if isinstance(stage, Selective) and stage.dynamic_sampling is not None:
            yield (
                f"{path}.dynamic_sampling: which groups are replaced is known when all have ended, and the periodic "
                f"schedule trains on some before; set {path}.schedule=synchronous, or dynamic_sampling=null"
            )
        for name in ("updates_per_batch", "epochs_per_batch"):
            if getattr(stage, name) > 1:
                yield (
                    f"{path}.{name}: the periodic schedule makes one update of the groups of a batch as they end, and "
                    f"{getattr(stage, name)} need the whole batch before the first; set {path}.{name}=1 or "
                    f"{path}.schedule=synchronous"
                )
        if schedule.chunk_groups > stage.prompts_per_step:
            yield (
                f"{path}.schedule.chunk_groups: {schedule.chunk_groups} groups never end, of {stage.prompts_per_step} "
                f"prompts; set it to {stage.prompts_per_step} or less (a part of them: with all, nothing overlaps)"
            )
        if stage.objective.masks and stage.objective.aggregation == "token_mean":
            yield (
                f"{path}.objective.overlong: a mean over the tokens that are not masked needs all of them, and the "
                f"periodic schedule trains on parts; set {path}.schedule=synchronous, or another "
                f"{path}.objective.aggregation"
            )
        if schedule.groups_in_memory < schedule.chunk_groups:
            yield (
                f"{path}.schedule.groups_in_memory: {schedule.groups_in_memory} hold no chunk of "
                f"{schedule.chunk_groups}; set it to {schedule.chunk_groups} or more"
            )


def selections(config: Config) -> Iterator[str]:
    for path, stage in rollout_stages(config):
        if not isinstance(stage, Selective):
            continue
        yield from (f"{path}.{problem}" for problem in selection_problems(stage.filter))
        names = [name for name in ("filter", "dynamic_sampling") if getattr(stage, name) is not None]
        if names and not any(reward.weight for reward in stage.rewards):
            yield f"{path}.{names[0]}: all rewards have weight 0, so that no group differs; give one a weight"


def lengths(config: Config) -> Iterator[str]:
    for path, section in samplers(config):
        engine = config.engines.get(section.engine)
        if engine is not None and section.sampling.max_tokens >= engine.max_model_len:
            yield (
                f"{path}.sampling.max_tokens: {section.sampling.max_tokens} leaves no room for a prompt in "
                f"engines.{section.engine}.max_model_len={engine.max_model_len}; lower the one or raise the other"
            )
    for i, stage in enumerate(config.stages):
        engine = config.engines.get(stage.engine) if isinstance(stage, OnPolicy) else None
        if engine is None or not isinstance(stage, OnPolicy) or stage.on_overlong == "drop":
            continue
        room = micro_batch_room(config, i)
        if 2 <= room < engine.max_model_len:
            needed = max(-(-engine.max_model_len // unit) * unit for unit in _units(config, i))
            yield (
                f"stages.{i}.micro_batch_tokens: {stage.micro_batch_tokens} {_rounded(config, i)}cannot hold the "
                f"longest sequence that the engine may return; set stages.{i}.micro_batch_tokens={needed} or more, or "
                f"engines.{stage.engine}.max_model_len={room} or less, or stages.{i}.on_overlong=drop"
            )


def _rounded(config: Config, number: int) -> str:
    """Where rounding takes something: how much is left, to go before "hold" or "cannot hold"."""
    room = micro_batch_room(config, number)
    if room == config.stages[number].micro_batch_tokens:
        return ""
    return f"(padded micro-batches are multiples of {max(_units(config, number))}, so that {room} are of use) "

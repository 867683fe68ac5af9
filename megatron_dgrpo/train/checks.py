"""What is found out about data and tokenizers before any rank or engine starts, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.rewards import Judge
from megatron_dgrpo.config.schema import DGRPO, SFT, Config, Evaluation
from megatron_dgrpo.config.stages import dgrpo_stages, micro_batch_room, samplers
from megatron_dgrpo.data.compatibility import check_fits, check_same
from megatron_dgrpo.data.dataset import Rows
from megatron_dgrpo.data.lengths import check_lengths
from megatron_dgrpo.data.teachers import check_teachers
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import ConfigError, DataError, DGRPOError, UnreachableError, listing
from megatron_dgrpo.observe.progress import Board
from megatron_dgrpo.rewards.checks import reward_problems


def main(*, config_path: str, answer_path: str) -> None:
    """Target of the supervisor: leaves the problems, and what else there is to say, in a file."""
    answer: dict[str, object] = {"problems": "", "notes": []}
    try:
        answer["notes"] = check_data(load(config_path))
    except ConfigError as error:
        answer["problems"] = str(error)
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def check_data(config: Config, *, without_tokenizer: Collection[str] = (), dry: bool = False) -> list[str]:
    """Tokenizers are one and fit their models; every row is readable and short enough; rewards can be computed. All
    problems in one error.

    Returns what was left out or not looked at. A dry run, which trains nothing, may lack tokenizers and the network:
    what they are needed for is among what was not looked at.
    """
    notes: list[str] = []
    names = dict.fromkeys([config.student, *(teacher.model for teacher in config.teachers)])
    problems: list[str] = []

    def attempt(check: Callable[[], object], where: str = "") -> None:
        try:
            check()
        except UnreachableError as error:
            notes.append(f"not checked: {where}{error}") if dry else problems.append(str(error))
        except DGRPOError as error:
            problems.append(str(error))

    tokenizers: dict[str, Tokenizer] = {}
    there = [name for name in names if name not in without_tokenizer]
    for name in there:
        attempt(lambda name=name: tokenizers.update({name: Tokenizer.load(config.models[name].path)}))  # type: ignore[misc]
    if len(tokenizers) == len(there):
        if tokenizers:
            attempt(lambda: check_same(tokenizers))
        for name, tokenizer in tokenizers.items():
            vocab_size = read_spec(config.models[name].path).vocab_size
            attempt(lambda n=name, t=tokenizer, v=vocab_size: check_fits(n, t, v))  # type: ignore[misc]
        for number in range(len(config.stages)):
            where = f"stages.{number}.data: "
            attempt(lambda i=number: _check_stage(config, i, tokenizers.get(config.student), notes), where)  # type: ignore[misc]
        attempt(lambda: _check_teachers(config), "teachers: ")
        attempt(lambda: _check_evaluation(config, tokenizers.get(config.student), notes), "evaluation.data: ")
    unreached = notes if dry else None
    for where, section in samplers(config):
        attempt(lambda w=where, s=section: problems.extend(_rewards(w, s, unreached)), f"{where}.rewards: ")  # type: ignore[misc]
    if problems:
        raise ConfigError(listing("The data, or what is asked of them, can't be used:", dict.fromkeys(problems)))
    return list(dict.fromkeys(notes))


def _check_stage(config: Config, number: int, tokenizer: Tokenizer | None, notes: list[str]) -> None:
    stage = config.stages[number]
    match stage:
        case SFT():
            limit, setting, response = micro_batch_room(config, number), f"stages.{number}.micro_batch_tokens", None
        case DGRPO():
            limit, setting = config.engines[stage.engine].max_model_len, f"engines.{stage.engine}.max_model_len"
            response = stage.sampling.max_tokens
    for source in stage.data.sources:
        if source.streaming:
            notes.append(
                f"not checked: stages.{number}.data: {source.where} is a stream: its rows are checked as they come"
            )
            continue
        with Board().task(f"read {source.where}"):
            rows = Rows(source, needs_answer=isinstance(stage, SFT))
        if rows.bad.count:
            notes.append(f"stages.{number}.data: {rows.bad.summary()}")
        if tokenizer is None:
            notes.append(f"not checked: stages.{number}.data: lengths of {source.where}, without a tokenizer")
        elif stage.on_overlong == "error":
            lengths = {"limit": limit, "setting": setting, "response_tokens": response}
            watched = Board().over(rows, f"check {source.where}", len(rows), "rows")
            unchecked = check_lengths(watched, tokenizer, **lengths)  # type: ignore[arg-type]
            if unchecked:
                notes.append(f"not checked: stages.{number}.data: the lengths of {unchecked} long rows")


def _check_teachers(config: Config) -> None:
    """Rows name teachers that there are, and none is loaded for nothing."""
    names = [teacher.model for teacher in config.teachers]
    problems, named = [], set()
    routed = [
        (path, source)
        for path, stage in dgrpo_stages(config)
        for source in stage.data.sources
        if source.teacher is not None
    ]
    for path, source in routed:
        if source.streaming:  # named as they come
            named.update(names)
            continue
        try:
            named |= check_teachers(Rows(source), names, where=f"{path}.data.teacher")
        except UnreachableError:
            raise
        except DataError as error:
            problems.append(str(error))
    if routed and not problems and (idle := [name for name in names if name not in named]):
        problems.append(
            f"teachers: no row of a dgrpo stage names {', '.join(map(repr, idle))}; take them out of the list"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _check_evaluation(config: Config, tokenizer: Tokenizer | None, notes: list[str]) -> None:
    settings = config.evaluation
    if settings is None:
        return
    rows = Rows(settings.data)
    if rows.bad.count:
        notes.append(f"evaluation.data: {rows.bad.summary()}")
    if len(rows) < settings.num_prompts:
        raise ConfigError(
            f"evaluation.num_prompts: {settings.data.where} has {len(rows)} rows; set it to {len(rows)} or less"
        )
    engine = config.engines[settings.engine]
    if tokenizer is None:
        notes.append(f"not checked: evaluation.data: lengths of {settings.data.where}, without a tokenizer")
        return
    check_lengths(
        Board().over(rows[: settings.num_prompts], f"check {settings.data.where}", settings.num_prompts, "rows"),
        tokenizer,
        limit=engine.max_model_len,
        setting=f"engines.{settings.engine}.max_model_len",
        response_tokens=settings.sampling.max_tokens,
    )


def _rewards(where: str, section: DGRPO | Evaluation, unreached: list[str] | None) -> list[str]:
    """Problems; with `unreached` a judge that does not answer is none, and goes there."""

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:  # read only where a reward reads more than the answer
        for source in section.data.sources:
            yield from ((row.name, row.fields) for row in (() if source.streaming else Rows(source)))

    if unreached is None:
        return reward_problems(section.rewards, where, rows())
    judges = [reward for reward in section.rewards if isinstance(reward, Judge)]
    others = [reward for reward in section.rewards if not isinstance(reward, Judge)]
    unreached += [f"not checked: {problem}" for problem in reward_problems(judges, where, ())] if judges else []
    return reward_problems(others, where, rows()) if others else []

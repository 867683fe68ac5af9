"""What is found out about data and tokenizers before any rank or engine starts, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.schema import DGRPO, SFT, Config
from megatron_dgrpo.config.stages import dgrpo_stages, micro_batch_room
from megatron_dgrpo.data.compatibility import check_fits, check_same
from megatron_dgrpo.data.dataset import read_rows
from megatron_dgrpo.data.lengths import check_lengths
from megatron_dgrpo.data.teachers import check_teachers
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import ConfigError, DataError, DGRPOError, listing


def main(*, config_path: str, answer_path: str) -> None:
    """Target of the supervisor: leaves the problems, or nothing, in a file."""
    try:
        check_data(load(config_path))
        problems = ""
    except ConfigError as error:
        problems = str(error)
    Path(answer_path).write_text(problems, encoding="utf-8")


def check_data(config: Config) -> None:
    """Tokenizers are one and fit their models; every row is readable and short enough. All problems in one error."""
    names = dict.fromkeys([config.student, *(teacher.model for teacher in config.teachers)])
    problems: list[str] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except DGRPOError as error:
            problems.append(str(error))

    tokenizers: dict[str, Tokenizer] = {}
    for name in names:
        attempt(lambda name=name: tokenizers.update({name: Tokenizer.load(config.models[name].path)}))  # type: ignore[misc]
    if len(tokenizers) == len(names):
        attempt(lambda: check_same(tokenizers))
        for name, tokenizer in tokenizers.items():
            vocab_size = read_spec(config.models[name].path).vocab_size
            attempt(lambda n=name, t=tokenizer, v=vocab_size: check_fits(n, t, v))  # type: ignore[misc]
        for number in range(len(config.stages)):
            attempt(lambda i=number: _check_stage(config, i, tokenizers[config.student]))  # type: ignore[misc]
        attempt(lambda: _check_teachers(config))
        attempt(lambda: _check_evaluation(config, tokenizers[config.student]))
    if problems:
        raise ConfigError(listing("The data can't be used as they are:", list(dict.fromkeys(problems))))


def _check_stage(config: Config, number: int, tokenizer: Tokenizer) -> None:
    stage = config.stages[number]
    match stage:
        case SFT():
            if stage.on_overlong == "drop":
                return
            limit, setting, response = micro_batch_room(config, number), f"stages.{number}.micro_batch_tokens", None
        case DGRPO():
            limit, setting = config.engines[stage.engine].max_model_len, f"engines.{stage.engine}.max_model_len"
            response = stage.sampling.max_tokens
    check_lengths(read_rows(stage.data), tokenizer, limit=limit, setting=setting, response_tokens=response)


def _check_teachers(config: Config) -> None:
    """Rows name teachers that there are, and none is loaded for nothing."""
    names = [teacher.model for teacher in config.teachers]
    problems, named = [], set()
    routed = [(path, stage.data) for path, stage in dgrpo_stages(config) if stage.data.teacher is not None]
    for path, data in routed:
        try:
            named |= check_teachers(read_rows(data), names, where=f"{path}.data.teacher")
        except DataError as error:
            problems.append(str(error))
    if routed and not problems and (idle := [name for name in names if name not in named]):
        problems.append(
            f"teachers: no row of a dgrpo stage names {', '.join(map(repr, idle))}; take them out of the list"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _check_evaluation(config: Config, tokenizer: Tokenizer) -> None:
    settings = config.evaluation
    if settings is None:
        return
    rows = read_rows(settings.data)
    if len(rows) < settings.num_prompts:
        raise ConfigError(
            f"evaluation.num_prompts: {settings.data.path} has {len(rows)} rows; set it to {len(rows)} or less"
        )
    engine = config.engines[settings.engine]
    check_lengths(
        rows[: settings.num_prompts],
        tokenizer,
        limit=engine.max_model_len,
        setting=f"engines.{settings.engine}.max_model_len",
        response_tokens=settings.sampling.max_tokens,
    )

"""What several settings must agree on, and what must be on the disk: everything that is wrong, before anything starts.

`problems` looks at the config alone, `file_problems` at the files that it names. Each returns sentences that begin with
the dotted path and end with the remedy; `check` and `check_files` raise them as one error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_dgrpo.config import engine_rules, layouts, metric_names, stages
from megatron_dgrpo.config.checkpoints import problems as checkpoint_problems
from megatron_dgrpo.config.checkpoints import run_dir_problems
from megatron_dgrpo.config.data import ROW_FILES, SAVED_DATASET, Dataset
from megatron_dgrpo.config.data import problems as data_problems
from megatron_dgrpo.config.explain import nearest
from megatron_dgrpo.config.schema import Config, Static
from megatron_dgrpo.config.stages import samplers
from megatron_dgrpo.config.trackers import missing_packages
from megatron_dgrpo.config.vocabularies import TOKENIZER_FILES, read_json, tokenizers
from megatron_dgrpo.errors import ConfigError, listing


def check(config: Config) -> None:
    """Raise everything that is contradictory in a config."""
    _raise("The config contradicts itself:", problems(config))


def check_files(config: Config, *, config_json_alone: Collection[str] = ()) -> None:
    """Raise everything that is contradictory in a config or wrong with the files that it names. Of some models it may
    be that nothing but config.json is there."""
    found = problems(config) + file_problems(config, config_json_alone=config_json_alone)
    _raise("The config cannot be run as it is:", found)


def problems(config: Config) -> list[str]:
    """What is contradictory; touches nothing outside the config."""
    rules: tuple[Callable[[Config], Iterator[str]], ...] = (
        _numbers, _model_names, layouts.problems, stages.teachers, _engines, _data, stages.objectives,
        stages.optimizers, stages.rewards, stages.batches, stages.schedules, stages.selections, stages.lengths,
        stages.shaping, metric_names.problems, _checkpoints,
    )  # fmt: skip
    return [problem for rule in rules for problem in rule(config)]


def file_problems(config: Config, *, config_json_alone: Collection[str] = ()) -> list[str]:
    """What is wrong on the disk. Relative paths are relative to the current folder."""
    rules: tuple[Callable[[Config], Iterator[str]], ...] = (
        lambda config: _model_folders(config, config_json_alone), tokenizers, _datasets, _run_dir,
        lambda config: missing_packages(config.trackers),
    )  # fmt: skip
    return [problem for rule in rules for problem in rule(config)]


def _raise(title: str, found: list[str]) -> None:
    if found:
        raise ConfigError(listing(title, found))


# ---- The config alone ------------------------------------------------------------------------------------------------


def _numbers(config: Config) -> Iterator[str]:
    for path, value in _leaves(config.model_dump(), ""):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{path}: {value} is no finite number; give one"
        if path.endswith("path") or path == "run_dir":
            if str(value).startswith("~"):
                yield f"{path}: {value!r}: ~ is not expanded here; write ${{oc.env:HOME}} or the whole path"
            elif not str(value).strip():
                yield f"{path}: empty; give a path"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _model_names(config: Config) -> Iterator[str]:
    named = [("student", config.student)]
    named += [(f"teachers.{i}.model", teacher.model) for i, teacher in enumerate(config.teachers)]
    named += [(f"engines.{name}.model", engine.model) for name, engine in config.engines.items()]
    for path, name in named:
        if name not in config.models:
            yield f"{path}: no model is called {name!r}{nearest(name, config.models)}"


def _data(config: Config) -> Iterator[str]:
    for i, stage in enumerate(config.stages):
        yield from data_problems(f"stages.{i}.data", stage.data, needs_answer=isinstance(stage, Static))
    if config.evaluation is not None:
        yield from data_problems("evaluation.data", config.evaluation.data)
        if config.evaluation.data.mixture or config.evaluation.data.streaming:
            yield "evaluation.data: takes the first rows of one source; name one, without streaming"


def _engines(config: Config) -> Iterator[str]:
    for path, section in samplers(config):
        engine = config.engines.get(section.engine)
        if engine is None:
            yield f"{path}.engine: no engine is called {section.engine!r}{nearest(section.engine, config.engines)}"
        elif engine.model != config.student and engine.model in config.models:
            yield (
                f"{path}.engine: engine {section.engine!r} serves {engine.model!r}, not the student; "
                f"set engines.{section.engine}.model={config.student}"
            )
    for name, engine in config.engines.items():
        model = config.models.get(engine.model)
        if model is not None and (engine.dtype or model.dtype) == "float64":
            yield f"engines.{name}.dtype: vLLM does not compute in float64; set engines.{name}.dtype=float32"
    yield from engine_rules.problems(config)


# ---- The disk --------------------------------------------------------------------------------------------------------


def used_models(config: Config) -> list[str]:
    """The student, the teachers and whatever an engine serves, each once."""
    names = [config.student, *(t.model for t in config.teachers), *(e.model for e in config.engines.values())]
    return [name for name in dict.fromkeys(names) if name in config.models]


def _model_folders(config: Config, config_json_alone: Collection[str]) -> Iterator[str]:
    for name in used_models(config):
        if name in config_json_alone:
            continue
        where, folder = f"models.{name}.path", Path(config.models[name].path)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            yield (
                f"{where}: {folder} {what} (looked from {Path.cwd()}); give the folder of a Hugging Face checkpoint, "
                "downloaded beforehand"
            )
            continue
        yield from (f"{where}: {problem}" for problem in _folder_problems(folder))


def _folder_problems(folder: Path) -> Iterator[str]:
    settings, problem = read_json(folder / "config.json")
    if problem:
        yield f"{problem}; fetch the whole checkpoint"
    elif not settings.get("architectures") and not settings.get("model_type"):
        yield f"{folder / 'config.json'} names no architecture; it is not the config of a model"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weights, problem = read_json(index)
        shards = sorted(set(weights.get("weight_map", {}).values()))
        if problem:
            yield f"{problem}; fetch it again"
        elif missing := [shard for shard in shards if not (folder / shard).is_file()]:
            yield f"{index} names {', '.join(missing)}, which {folder} lacks; fetch the whole checkpoint"
    elif not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        remedy = "convert the pickled weights: they are never read" if pickled else "fetch the whole checkpoint"
        yield f"{folder} has no *.safetensors; {remedy}"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the one of the model it comes from"


def _datasets(config: Config) -> Iterator[str]:
    for where, data in _data_sections(config):
        for number, source in enumerate(data.sources):
            if source.path is not None:
                place = f"{where}.mixture.{number}.path" if data.mixture else f"{where}.path"
                yield from (f"{place}: {problem}" for problem in _rows_problems(Path(source.path)))


def _rows_problems(path: Path) -> Iterator[str]:
    if path.is_dir():
        if not any(file.suffix in ROW_FILES or file.name in SAVED_DATASET for file in path.rglob("*")):
            yield (
                f"{path} has no file that ends in {' or '.join(ROW_FILES)}, and is no folder that the library datasets "
                "has saved; give one of these"
            )
    elif not path.exists():
        yield f"{path} does not exist (looked from {Path.cwd()}); give a file that ends in {' or '.join(ROW_FILES)}"
    elif path.suffix not in ROW_FILES:
        yield f"{path} ends in none of {', '.join(ROW_FILES)}; name a file of one of these kinds, or a folder"
    elif path.stat().st_size == 0:
        yield f"{path} is empty; give a file with a row at least"


def _data_sections(config: Config) -> list[tuple[str, Dataset]]:
    found = [(f"stages.{i}.data", stage.data) for i, stage in enumerate(config.stages)]
    return found + ([("evaluation.data", config.evaluation.data)] if config.evaluation else [])


def _run_dir(config: Config) -> Iterator[str]:
    return run_dir_problems(config.run_dir)


def _checkpoints(config: Config) -> Iterator[str]:
    return (f"checkpoints.{problem}" for problem in checkpoint_problems(config.checkpoints))

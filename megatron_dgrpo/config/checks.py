"""What several settings must agree on, and what must be on the disk: everything that is wrong, before anything starts.

`problems` looks at the config alone, `file_problems` at the files that it names. Each returns sentences that begin with
the dotted path and end with the remedy; `check` and `check_files` raise them as one error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_dgrpo.config import layouts, stages
from megatron_dgrpo.config.data import ROW_FILES, SAVED_DATASET, Dataset
from megatron_dgrpo.config.data import problems as data_problems
from megatron_dgrpo.config.explain import nearest
from megatron_dgrpo.config.mismatch import problems as mismatch_problems
from megatron_dgrpo.config.objective import problems as objective_problems
from megatron_dgrpo.config.schema import SFT, Config, Engine
from megatron_dgrpo.config.stages import dgrpo_stages, samplers
from megatron_dgrpo.config.trackers import missing_packages
from megatron_dgrpo.config.vocabularies import TOKENIZER_FILES, read_json, tokenizers
from megatron_dgrpo.errors import ConfigError, listing

_ADDRESS = re.compile(r"tcp:(\[[0-9a-fA-F:.]+\]|[^\s:]+):\d{1,5}|unix:/\S+")


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
        _numbers, _model_names, layouts.problems, _teachers, _engines, _data, _objectives, stages.rewards,
        stages.batches, stages.schedules, stages.lengths, stages.shaping,
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
    for i, stage in enumerate(config.stages):
        for j, beta in enumerate(stage.optimizer.betas):
            if not 0 <= beta < 1:
                yield f"stages.{i}.optimizer.betas.{j}: {beta} is not in [0, 1); 0.9 and 0.95 are usual"


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


def _teachers(config: Config) -> Iterator[str]:
    names = [teacher.model for teacher in config.teachers]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"teachers: {name!r} is listed {names.count(name)} times; list it once"
    taught = [path for path, stage in dgrpo_stages(config) if stage.objective.uses_teacher]
    for path in taught:
        if not names:
            yield (
                f"{path}.objective.beta: the KL needs a teacher; add teachers: [{{model: NAME}}], "
                f"or set {path}.objective.beta=0 for GRPO alone"
            )
    for path, stage in dgrpo_stages(config):
        routed = [source.teacher is not None for source in stage.data.sources]
        if path in taught and len(set(names)) > 1 and not all(routed):
            yield (
                f"{path}.data.teacher: {len(set(names))} teachers are listed, and nothing says which of them scores a "
                f"row; set {path}.data.teacher to the field with the name of its teacher's model, or keep one teacher"
            )
        elif path not in taught and any(routed):
            yield f"{path}.data.teacher: the stage has no teacher; remove it, or set {path}.objective.beta above 0"
    if names and not taught:
        why = "every dgrpo stage has objective.beta 0" if dgrpo_stages(config) else "there is no dgrpo stage"
        yield f"teachers: listed, but no stage uses one ({why}); set teachers=[] or an objective.beta above 0"
    for path, stage in dgrpo_stages(config):
        if not stage.objective.uses_teacher and not any(reward.weight for reward in stage.rewards):
            yield (
                f"{path}: all rewards have weight 0 and objective.beta is 0, so that nothing is learnt; "
                "give a reward a weight, or beta a value above 0"
            )


def _data(config: Config) -> Iterator[str]:
    for i, stage in enumerate(config.stages):
        yield from data_problems(f"stages.{i}.data", stage.data, needs_answer=isinstance(stage, SFT))
        if isinstance(stage, SFT) and any(source.teacher is not None for source in stage.data.sources):
            yield f"stages.{i}.data.teacher: this stage has no teacher; remove it"
    if config.evaluation is not None:
        yield from data_problems("evaluation.data", config.evaluation.data)
        if config.evaluation.data.mixture or config.evaluation.data.streaming:
            yield "evaluation.data: takes the first rows of one source; name one, without streaming"


def _objectives(config: Config) -> Iterator[str]:
    for path, stage in dgrpo_stages(config):
        yield from (f"{path}.objective.{problem}" for problem in objective_problems(stage.objective))
        yield from (f"{path}.mismatch.{problem}" for problem in mismatch_problems(stage.mismatch))


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
        yield from _addresses(f"engines.{name}", engine)


def _addresses(where: str, engine: Engine) -> Iterator[str]:
    if engine.replicas > 1 and engine.addresses:
        yield f"{where}.replicas: the hosts at its addresses are its replicas; leave replicas out"
    if engine.addresses and engine.key_file is None:
        yield f"{where}.key_file: engines at addresses ask for a key; name the file that `dgrpo engine` was given"
    if engine.key_file is not None and not engine.addresses:
        yield f"{where}.key_file: engines that the run starts have a key of the run's; leave key_file out"
    for i, address in enumerate(engine.addresses):
        if not _ADDRESS.fullmatch(address):
            yield f"{where}.addresses.{i}: {address!r} is no address; write tcp:HOST:PORT or unix:/PATH"
        if address in engine.addresses[:i]:
            yield f"{where}.addresses.{i}: {address} is listed twice; list each host once"


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


_BEFORE_THE_FIRST_STEP = ("config.yaml", "environment.json", "events.jsonl", "logs")
"""All that a run leaves that failed before it had anything to keep: it may be started again, and its logs go on."""


def _run_dir(config: Config) -> Iterator[str]:
    folder = Path(config.run_dir)
    if folder.is_dir():
        if any(entry.name not in _BEFORE_THE_FIRST_STEP for entry in folder.iterdir()):
            yield f"run_dir: {folder} is not empty; name a new folder, or remove it if its run is not needed"
            return
    elif folder.exists() or folder.is_symlink():
        yield f"run_dir: {folder} is no folder; name a new one"
        return
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "cannot be written to" if parent.is_dir() else "is no folder"
        yield f"run_dir: {folder} cannot be made: {parent} {what}; name a folder under one that you may write to"

"""`dgrpo train --dry-run`: everything that a run checks, what each rank would hold, and nothing else. Imports no torch.

What cannot be looked at from here (weights of which only config.json is there, a dataset on a hub that is not reached)
is listed as not checked. The run's folder is not made.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.config.checks import check_files, used_models
from megatron_dgrpo.config.loader import dump
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.config.vocabularies import TOKENIZER_FILES
from megatron_dgrpo.errors import ConfigError, listing
from megatron_dgrpo.launch.engines import check_engines
from megatron_dgrpo.launch.memory import Held, Sized, engine_memory, training_checkpoint_bytes
from megatron_dgrpo.launch.memory_table import in_words, stage_lines, widest_rank
from megatron_dgrpo.launch.preflight import check_models
from megatron_dgrpo.launch.run import CHECK_S, used_engines
from megatron_dgrpo.launch.supervisor import Supervisor
from megatron_dgrpo.model.spec import ModelSpec

_UNCHECKED = "not checked: "
_SOON_S = 2.0


def dry_run(config: Config, *, device_memory: int | None = None, resolved: Path | None = None) -> int:
    """Check a config, print what it would take, write it resolved; returns the exit status."""
    alone = [name for name in used_models(config) if config_json_alone(Path(config.models[name].path))]
    check_files(config, config_json_alone=alone)
    check_models(config, config_json_alone=alone)
    unreached = list(_unreached_engines(config))
    found = _look(config, alone)
    if found["problems"]:
        raise ConfigError(listing("The config cannot be run as it is:", found["problems"]))
    memory = device_memory or found["device_memory"]
    sized = _sized(config, found["held"])
    lines, fullest = [], 0
    for number in range(len(config.stages)):
        lines += stage_lines(config, number, sized, gpu=memory is not None, device_memory=memory)
        fullest = max(fullest, widest_rank(config, number, sized, gpu=memory is not None))
    lines += _engines(config, sized)
    lines += _files(sized[config.student])
    lines += _unchecked(config, alone, [*unreached, *found["notes"]], memory)
    print("\n".join(lines))
    if memory is not None and fullest > memory:
        raise ConfigError(
            f"a rank needs {in_words(fullest)} of a device's {in_words(memory)} by the table above: spread the "
            "models over more ranks (tp, pp, cp), recompute (models.NAME.recompute=full), lower micro_batch_tokens, or "
            "put the teacher into host memory (teachers.0.weights_in=host, rows_in=host)"
        )
    print(f"Resolved config: {_write(config, resolved)}. Nothing was trained.")
    return 0


def config_json_alone(folder: Path) -> bool:
    """Whether config.json is all that a folder has of a checkpoint: neither weights nor a tokenizer."""
    weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "*.bin", "*.pt*"))
    tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return (folder / "config.json").is_file() and not weights and not tokenizer


def parse_bytes(text: str) -> int:
    """80GiB, 80GB, 85899345920."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|B|[KMGT]i?B)", text.strip())
    if not match:
        raise ValueError(f"{text!r} is no size: write 80GiB, 80GB or a number of bytes")
    number, unit = match.groups()
    base = 1024 if "i" in unit else 1000
    return int(float(number) * base ** " KMGT".index(unit[0] if len(unit) > 1 else " "))


def _look(config: Config, alone: Sequence[str]) -> dict[str, Any]:
    """What the process with torch finds: shapes, data."""
    scratch = Path(tempfile.mkdtemp(prefix="dgrpo-dry-"))
    try:
        with Supervisor(scratch, echo=None) as supervisor:
            supervisor.prepare("trainer")
            path, answer = scratch / "config.yaml", scratch / "answer.json"
            path.write_text(dump(config), encoding="utf-8")
            arguments = {"config_path": str(path), "answer_path": str(answer), "alone": list(alone)}
            supervisor.run_check("megatron_dgrpo.train.dry_run:main", arguments, timeout_s=CHECK_S)
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unreached_engines(config: Config) -> Iterator[str]:
    """Engines at addresses that do not answer now; one that answers, and is not what the run needs, is an error."""
    soon = {name: engine.model_copy(update={"start_timeout_s": _SOON_S}) for name, engine in config.engines.items()}
    for name in used_engines(config):
        try:
            check_engines(config.model_copy(update={"engines": soon}), [name])
        except ConfigError as error:
            if "could not be reached" not in str(error):
                raise
            yield f"{_UNCHECKED}{error}"


def _sized(config: Config, held: Mapping[str, Sequence[Mapping[str, int]]]) -> dict[str, Sized]:
    return {
        name: Sized(
            name,
            config.models[name],
            read_spec(config.models[name].path, config.models[name].rope),
            [Held(**one) for one in stages],
        )
        for name, stages in held.items()
    }


def num_parameters(spec: ModelSpec) -> int:
    return sum(math.prod(rule.hf_shape) for rule in rules(spec))


def _engines(config: Config, sized: Mapping[str, Sized]) -> Iterator[str]:
    for name in used_engines(config):
        engine = config.engines[name]
        hosts = len(engine.addresses) or engine.replicas
        each = f" ({hosts} hosts)" if hosts > 1 else ""
        each += f" on each of {engine.tp} ranks" if engine.tp > 1 else ""
        model = config.models[engine.model]
        spec = sized[engine.model].spec
        memory = engine_memory(engine, engine.dtype or model.dtype, spec, num_parameters(spec))
        yield (
            f"Engine {name}{each}: weights {in_words(memory.weights)}, keys and values "
            f"{in_words(memory.kv_cache)} ({in_words(memory.kv_per_token)} a token, {memory.sequences:.1f} sequences "
            f"of {engine.max_model_len} tokens at a time, at most {engine.max_num_seqs}); weights arrive through "
            f"{in_words(memory.buckets)} of shared memory"
        )


def _files(student: Sized) -> Iterator[str]:
    parameters = num_parameters(student.spec)
    yield (
        f"Files: the exported folder {in_words(parameters * student.bytes_per_number)} ({parameters / 1e9:.2f} billion "
        f"parameters), a training checkpoint {in_words(training_checkpoint_bytes(student, parameters))}"
    )


def _unchecked(config: Config, alone: Sequence[str], notes: Sequence[str], memory: int | None) -> Iterator[str]:
    for note in notes:
        if not note.startswith(_UNCHECKED):
            yield f"Note: {note}"
    unchecked = [
        f"models.{name}: weights and tokenizer, since {config.models[name].path} has config.json alone"
        for name in alone
    ]
    unchecked += [note.removeprefix(_UNCHECKED) for note in notes if note.startswith(_UNCHECKED)]
    if memory is None:
        unchecked.append("whether a device has that memory: none is here; give --device-memory 80GiB")
    yield f"Not checked: {len(unchecked) or 'nothing'}"
    yield from (f"- {one}" for one in unchecked)


def _write(config: Config, path: Path | None) -> Path:
    path = path or Path(f"{config.run_dir.rstrip('/')}.resolved.yaml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error}): name another file with --resolved") from None
    return path

"""`dgrpo train` on one node: check everything, start the processes, watch them. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_dgrpo.checkpoint.hf.families import read_spec, rope_parameters
from megatron_dgrpo.config.checks import check_files
from megatron_dgrpo.config.loader import dump
from megatron_dgrpo.config.schema import Config, Engine, Model
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.preflight import check_models
from megatron_dgrpo.launch.supervisor import Supervisor
from megatron_dgrpo.observe.environment import write_environment
from megatron_dgrpo.observe.events import EventLog, run_events

CHECK_S = 3600.0
"""All data is read and tokenised once."""


def train(config: Config) -> int:
    """Run a config from its start to its end; returns the exit status."""
    check_files(config)
    check_models(config)
    resolved = _make_run_dir(config)
    with run_events(config.run_dir), Supervisor(config.run_dir) as supervisor:
        names = used_engines(config)
        supervisor.prepare("trainer")
        if names:
            supervisor.prepare("engine")  # its imports take longest: they go on while the data is checked
        _check_data(supervisor, resolved)
        addresses = {name: f"unix:{supervisor.private_dir / f'{name}.sock'}" for name in names}
        supervisor.start_ranks(
            "megatron_dgrpo.train.worker:main",
            {
                "config_path": str(resolved),
                "engines": addresses,
                "key": supervisor.key,
                "shm_prefix": supervisor.shm_prefix,
            },
            world_size=config.num_ranks,
            threads=config.threads_per_rank,
        )
        for name in names:
            engine = config.engines[name]
            supervisor.start_engine(
                f"engine-{name}",
                "megatron_dgrpo.rollout.host:serve",
                _engine_args(
                    engine,
                    config.models[engine.model],
                    addresses[name],
                    supervisor.key,
                    deterministic=config.rollout.deterministic,
                ),
                threads=engine.threads,
            )
        supervisor.watch()
    return 0


def _make_run_dir(config: Config) -> Path:
    """The run's folder, with the resolved config in it."""
    resolved = Path(config.run_dir) / "config.yaml"
    try:
        resolved.parent.mkdir(parents=True, exist_ok=True)
        resolved.write_text(dump(config), encoding="utf-8")
        write_environment(resolved.parent)
    except OSError as error:
        raise ConfigError(f"run_dir: {config.run_dir} can't be written ({error}): name another folder") from None
    return resolved


def _check_data(supervisor: Supervisor, resolved: Path) -> None:
    """Tokenizers need libraries that this process does not import: another one looks, before anything else starts."""
    answer = supervisor.private_dir / "problems"
    arguments = {"config_path": str(resolved), "answer_path": str(answer)}
    supervisor.run_check("megatron_dgrpo.train.checks:main", arguments, timeout_s=CHECK_S)
    found = json.loads(answer.read_text(encoding="utf-8"))
    if found["problems"]:
        raise ConfigError(found["problems"])
    for note in found["notes"]:
        supervisor.say(note)
        EventLog(resolved.parent).write("data", note, level="warning")


def used_engines(config: Config) -> list[str]:
    """The engines that a stage or the evaluation asks for, in the config's order."""
    wanted = {stage.engine for stage in config.stages if stage.kind == "dgrpo"}
    if config.evaluation is not None:
        wanted.add(config.evaluation.engine)
    return [name for name in config.engines if name in wanted]


def _engine_args(engine: Engine, model: Model, address: str, key: str, *, deterministic: bool) -> dict[str, object]:
    return {
        "address": address,
        "key": key,
        "model_path": str(Path(model.path).absolute()),
        "dtype": engine.dtype or model.dtype,
        "max_model_len": engine.max_model_len,
        "kv_cache_bytes": engine.kv_cache_bytes,
        "max_num_seqs": engine.max_num_seqs,
        "prefix_cache": engine.prefix_cache,
        "threads": engine.threads,
        "chunked_prefill": engine.chunked_prefill,
        "deterministic": deterministic,
        "hf_overrides": _rope(model),
    }


def _rope(model: Model) -> dict[str, object]:
    """The model's other rotary embeddings, in the form of its config.json."""
    if model.rope is None:
        return {}
    spec = read_spec(model.path, model.rope)
    return {"rope_parameters": rope_parameters(spec.rope), "max_position_embeddings": spec.max_positions}

"""`dgrpo train` on one node: check everything, start the processes, watch them. Imports no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_dgrpo import points
from megatron_dgrpo.config.checks import check_files
from megatron_dgrpo.config.loader import dump
from megatron_dgrpo.config.schema import Config, OnPolicy
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.engines import check_engines, engine_args, host_names
from megatron_dgrpo.launch.preflight import check_models
from megatron_dgrpo.launch.resume import check_resume, finished, identities, locked
from megatron_dgrpo.launch.supervisor import Supervisor
from megatron_dgrpo.observe.environment import write_environment
from megatron_dgrpo.observe.events import EventLog, run_events

CHECK_S = 3600.0
"""All data is read and tokenised once."""


def train(config: Config) -> int:
    """Run a config from its start to its end; returns the exit status."""
    check_files(config)
    check_models(config)
    check_engines(config, used_engines(config))
    with locked(config.run_dir):
        if finished(config.run_dir):
            print(f"{config.run_dir} has a run that is finished: nothing is done. Name another run_dir for another run")
            return 0
        made_with = identities(config)
        check_resume(config, made_with)
        _run(config, made_with)
    return 0


def _run(config: Config, made_with: dict[str, str]) -> None:
    started, settings = time.monotonic(), config.checkpoints
    limit = settings.time_limit_s
    resolved = _make_run_dir(config)
    with (
        run_events(config.run_dir),
        Supervisor(
            config.run_dir,
            saving_s=settings.grace_s,
            stall_s=stall_s(config),
            ends_at=None if limit is None else started + limit - settings.margin_s,
        ) as supervisor,
    ):
        names = [name for name in used_engines(config) if not config.engines[name].addresses]
        supervisor.prepare("trainer")
        if names:
            supervisor.prepare("engine")  # its imports take longest: they go on while the data is checked
        _check_data(supervisor, resolved)
        hosts = {name: engine_hosts(supervisor, config, name) for name in names}
        supervisor.start_ranks(
            "megatron_dgrpo.train.worker:main",
            {
                "config_path": str(resolved),
                "engines": {name: [f"unix:{path}" for _, path in found] for name, found in hosts.items()},
                "key": supervisor.key,
                "control": supervisor.listen(),
                "shm_prefix": supervisor.shm_prefix,
                "requests": str(supervisor.private_dir),
                "identities": made_with,
            },
            world_size=config.num_ranks,
            threads=config.threads_per_rank,
        )
        for name, found in hosts.items():
            for host, path in found:
                start_engine(supervisor, config, name, host, path)
        supervisor.watch()


def stall_s(config: Config) -> float:
    """How long rank 0 may show no sign of life: it waits for an engine that starts, and for the first answer."""
    engines = [config.engines[name] for name in used_engines(config)]
    waits = [engine.start_timeout_s + engine.request_timeout_s for engine in engines]
    return config.stall_timeout_s + max(waits, default=0.0)


def _make_run_dir(config: Config) -> Path:
    """The run's folder, with the resolved config in it."""
    resolved = Path(config.run_dir) / "config.yaml"
    fresh = resolved.with_name(".config.yaml.new")  # an earlier run's stays whole where the disk is full
    try:
        resolved.parent.mkdir(parents=True, exist_ok=True)
        points.write_file("config.new", fresh, dump(config).encode(), synced=False)
        points.rename("config.name", fresh, resolved)
        write_environment(resolved.parent)
    except OSError as error:
        raise ConfigError(
            f"run_dir: {config.run_dir} can't be written ({error}): free space there, or name another folder"
        ) from None
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
    wanted = {stage.engine for stage in config.stages if isinstance(stage, OnPolicy)}
    if config.evaluation is not None:
        wanted.add(config.evaluation.engine)
    return [name for name in config.engines if name in wanted]


def engine_hosts(supervisor: Supervisor, config: Config, name: str) -> list[tuple[str, Path]]:
    """Name and socket of each host that is started for an engine."""
    names = host_names(name, config.engines[name].replicas)
    return [(host, supervisor.private_dir / f"{host}.sock") for host in names]


def start_engine(supervisor: Supervisor, config: Config, name: str, host: str, path: Path) -> None:
    engine = config.engines[name]
    supervisor.start_engine(
        host,
        "megatron_dgrpo.rollout.host:serve",
        engine_args(config, name, f"unix:{path}", supervisor.key),
        threads=engine.threads,
        socket=path,
        max_restarts=engine.max_restarts,
    )

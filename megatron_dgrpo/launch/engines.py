"""Engines of a run as seen from outside of it: their processes' names, those given by address, one started by hand.

Engines at addresses are asked who they are before anything starts. Imports no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from megatron_dgrpo.checkpoint.hf.families import read_spec, rope_parameters
from megatron_dgrpo.config.explain import nearest
from megatron_dgrpo.config.schema import Config, Model
from megatron_dgrpo.errors import ConfigError, RolloutError, listing
from megatron_dgrpo.launch.preflight import check_engine
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.compatibility import (
    Expected,
    architecture,
    between_replicas,
    differences,
    this_side,
    vllm_version,
)
from megatron_dgrpo.rollout.keys import key_problem, read_key
from megatron_dgrpo.rollout.messages import EngineInfo
from megatron_dgrpo.rollout.transports import Side

_QUICK_S = 2.0


def host_names(engine: str, replicas: int) -> list[str]:
    """Names of the processes that the supervisor starts for an engine."""
    return [f"engine-{engine}"] if replicas == 1 else [f"engine-{engine}-{i}" for i in range(replicas)]


def expected_engine(config: Config, name: str, trainer: Side | None = None) -> Expected:
    """What an engine must be. `trainer` says what is known of the ranks, once they are there."""
    settings = config.engines[name]
    model = config.models[settings.model]
    spec = read_spec(model.path, model.rope)
    dtype = settings.dtype or model.dtype
    return Expected(
        f"engines.{name}",
        architecture(model.path),
        spec.vocab_size,
        settings.max_model_len,
        dtype,
        vllm_version(),
        trainer or this_side(),
        settings.transport,
        settings.placement,
        settings.quantization or "",
    )


def engine_args(config: Config, name: str, address: str, key: str) -> dict[str, object]:
    """What `rollout.host.serve` is told."""
    engine = config.engines[name]
    model = config.models[engine.model]
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
        "tp": engine.tp,
        "chunked_prefill": engine.chunked_prefill,
        "deterministic": config.rollout.deterministic,
        "sleeps": engine.placement == "colocated",
        "hf_overrides": _rope(model),
        "quantization": engine.quantization,
    }


def _rope(model: Model) -> dict[str, object]:
    """The model's other rotary embeddings, in the form of its config.json."""
    if model.rope is None:
        return {}
    spec = read_spec(model.path, model.rope)
    return {"rope_parameters": rope_parameters(spec.rope), "max_position_embeddings": spec.max_positions}


# ---- by address ----


def check_engines(config: Config, names: Sequence[str]) -> None:
    """Whether the engines given by address are there, and are those that the run needs; all problems in one error."""
    problems = []
    for name in names:
        if config.engines[name].addresses:
            problems += _problems(config, name)
    if problems:
        raise ConfigError(listing("The engines can't be used as they are:", problems))


def _problems(config: Config, name: str) -> list[str]:
    settings, where = config.engines[name], f"engines.{name}"
    assert settings.key_file is not None, "checks of the config see to it"
    if problem := key_problem(settings.key_file):
        return [f"{where}.key_file: {problem}"]
    key, needed = read_key(settings.key_file), expected_engine(config, name)
    infos: list[tuple[str, EngineInfo]] = []
    problems = []
    for i, address in enumerate(settings.addresses):
        try:
            infos.append((f"the engine at {address}", _describe(address, key, settings.start_timeout_s)))
        except RolloutError as error:
            problems.append(
                f"{where}.addresses.{i}: {error}; start it with `dgrpo engine CONFIG.yaml {name} --listen {address} "
                f"--key-file FILE`, with the same key as {settings.key_file}"
            )
    for engine, info in infos:
        problems += differences(needed, engine, info)
    return problems + between_replicas(infos)


def _describe(address: str, key: str, deadline_s: float) -> EngineInfo:
    def ask(within_s: float) -> EngineInfo:
        with contextlib.closing(EngineClient.connect(address, key, deadline_s=within_s, owner=False)) as client:
            return client.describe(deadline_s=within_s)

    try:
        return ask(min(_QUICK_S, deadline_s))
    except RolloutError as error:
        if "could not be reached" not in str(error) or deadline_s <= _QUICK_S:
            raise
    print(f"waiting for the engine at {address}, for at most {deadline_s:g} s", flush=True)
    return ask(deadline_s - _QUICK_S)


def serve(config: Config, name: str, address: str, key_file: str) -> int:
    """`dgrpo engine`: an engine host in this process, until its last owner has gone."""
    if name not in config.engines:
        raise ConfigError(f"engines: no engine is called {name!r}{nearest(name, config.engines)}")
    if problem := key_problem(key_file):
        raise ConfigError(f"--key-file: {problem}")
    check_engine(config, name)
    from megatron_dgrpo.rollout.host import serve as serve_engine

    print(f"engine {name} will listen at {address}; it ends with the run that uses it", flush=True)
    serve_engine(**engine_args(config, name, address, read_key(key_file)))  # type: ignore[arg-type]
    return 0

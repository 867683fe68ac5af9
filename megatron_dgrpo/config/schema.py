"""The whole configuration of a run, as frozen data. Every field says what it is; defaults are here, nowhere else.

What one field alone can check is checked here; what several fields must agree on is in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.checkpoints import Checkpoints, Resume
from megatron_dgrpo.config.data import Dataset
from megatron_dgrpo.config.engines import Engine
from megatron_dgrpo.config.frozen import DType, Frozen
from megatron_dgrpo.config.kinds import (
    DGRPO,
    GRPO,
    KD,
    OPD,
    SFT,
    AnyStage,
    OnPolicy,
    Periodic,
    Selective,
    Stage,
    Static,
    Synchronous,
)
from megatron_dgrpo.config.objective import Objective
from megatron_dgrpo.config.optimizer import Adam
from megatron_dgrpo.config.rewards import Reward
from megatron_dgrpo.config.rope import DefaultRope, Llama3Rope, RopeScaling, YarnRope
from megatron_dgrpo.config.sampling import Sampling
from megatron_dgrpo.config.trackers import TrackerSettings

__all__ = [
    "DGRPO", "GRPO", "KD", "OPD", "SFT", "Adam", "AnyStage", "Config", "DType", "DefaultRope", "Engine", "Evaluation",
    "Layout", "Llama3Rope", "Model", "Objective", "OnPolicy", "Periodic", "Rollout", "RopeScaling", "Sampling",
    "Selective", "Stage", "Static", "Synchronous", "Teacher", "YarnRope",
]  # fmt: skip


class Layout(Frozen):
    """How one model is spread over ranks."""

    tp: PositiveInt = 1
    """Tensor-parallel size: each layer's matrices and the vocabulary are cut into this many shards."""
    cp: PositiveInt = 1
    """Context-parallel size: a micro-batch's tokens are spread over this many ranks, which exchange keys and values."""
    dp: PositiveInt = 1
    """Data-parallel size: replicas that work on different micro-batches."""
    pp: PositiveInt = 1
    """Pipeline stages: each has a part of the layers. The embedding and the head count as a layer each."""
    vpp: PositiveInt = 1
    """Virtual stages: each stage has so many parts that are not neighbours, for a shorter bubble (needs pp > 1)."""
    ep: PositiveInt = 1
    """Expert-parallel size: experts are spread over so many of a stage's tp x cp x dp ranks."""
    etp: PositiveInt = 1
    """Tensor-parallel size of the experts; etp x ep divides tp x cp x dp."""
    sequence_parallel: bool = False
    """Cut the activations between tensor-parallel regions along the sequence, too (needs tp > 1)."""

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp


class Model(Frozen):
    """A model in Hugging Face format."""

    path: str
    """Folder with config.json, safetensors and a tokenizer."""
    dtype: DType = "bfloat16"
    """Type of the weights in training (the optimizer's master weights are float32 whenever this is bfloat16)."""
    layout: Layout = Layout()
    rope: Annotated[RopeScaling, Field(discriminator="kind")] | None = None
    """Other rotary embeddings than config.json names, in training, as a teacher and in engines."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing, attention, or whole layers."""
    offload_layers: NonNegativeInt = 0
    """The first layers, but not all: their activations wait for backward in host memory (needs layers = te, pp = 1)."""
    layers: Literal["auto", "te", "local"] = "auto"
    """Transformer Engine's linear layers or Megatron-Core's own; auto: the former where they and a GPU are there."""
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = None
    """Recipe of FP8 products, with weights in bfloat16 (needs Transformer Engine; mxfp8 needs Blackwell)."""


class Teacher(Frozen):
    """A frozen model that scores the student's tokens."""

    model: str
    """Name of the model."""
    ranks: Literal["shared", "own"] = "shared"
    """Run on the student's ranks (and further ones, where its layout is larger), or on ranks of its own after those of
    all others: teachers with ranks of their own follow each other in their order."""
    weights_in: Literal["device", "host"] = "device"
    """Where its layers rest between uses: on the device, or in pinned host memory."""
    rows_in: Literal["device", "host"] = "device"
    """Where what it says of a batch waits for the student: on the device, or spread over the host memory of the
    student's tensor-parallel ranks."""


class Evaluation(Frozen):
    """Mean reward on held-out prompts, one response each."""

    data: Dataset
    engine: str
    num_prompts: PositiveInt
    """The first so many rows of the data."""
    sampling: Sampling
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    every: NonNegativeInt = 0
    """Evaluate every so many steps, and always before the first and after the last step of a stage (0: only then)."""


class Rollout(Frozen):
    """What holds for all engines."""

    deterministic: bool = False
    """The same bits for the same run on the same machine: an engine serves one batch at a time, from nothing that was
    before it, and one that was cut short is generated again whole."""


class Config(Frozen):
    """A run."""

    run_dir: str
    """Folder for everything that the run leaves behind: a new one, or that of a run that is to go on."""
    seed: NonNegativeInt = 0
    threads_per_rank: PositiveInt = 1
    """CPU threads of each trainer rank."""
    collective_timeout_s: PositiveFloat = 600.0
    """A collective that takes longer ends the run."""
    stall_timeout_s: PositiveFloat = 3600.0
    """A rank 0 that shows no sign of life for so long, beyond what its engines may take, ends the run."""
    keep_rollouts: PositiveInt | None = None
    """Keep the rollouts of the last so many steps in run_dir/rollouts; those of all steps where no number is given."""
    models: Annotated[dict[str, Model], Field(min_length=1)]
    student: str
    """Name of the model that is trained."""
    teachers: tuple[Teacher, ...] = ()
    """Where there are several, each row of a dgrpo stage names its own (stages.N.data.teacher)."""
    engines: dict[str, Engine] = {}
    reward_workers: PositiveInt = 2
    """Processes in which responses are scored, beside rank 0."""
    rollout: Rollout = Rollout()
    checkpoints: Checkpoints = Checkpoints()
    resume: Resume = Resume()
    evaluation: Evaluation | None = None
    trackers: tuple[TrackerSettings, ...] = ()
    """Where figures go beside metrics.jsonl: tensorboard, wandb, mlflow."""
    stages: Annotated[tuple[Annotated[AnyStage, Field(discriminator="kind")], ...], Field(min_length=1)]
    """Run in order, each from the previous one's weights."""

    @property
    def first_ranks(self) -> tuple[int, ...]:
        """Where each teacher's ranks begin; the last number is that of all ranks."""
        shared = [self.student, *(teacher.model for teacher in self.teachers if teacher.ranks == "shared")]
        end = max(self.models[name].layout.world_size for name in shared)
        first = []
        for teacher in self.teachers:
            first.append(end if teacher.ranks == "own" else 0)
            end += self.models[teacher.model].layout.world_size if teacher.ranks == "own" else 0
        return (*first, end)

    @property
    def num_ranks(self) -> int:
        """Ranks of the student, and those of teachers that are not among them."""
        return self.first_ranks[-1]

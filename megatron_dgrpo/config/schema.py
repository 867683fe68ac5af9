"""The whole configuration of a run, as frozen data. Every field says what it is; defaults are here, nowhere else.

What one field alone can check is checked here; what several fields must agree on is in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.data import Dataset
from megatron_dgrpo.config.frozen import Frozen
from megatron_dgrpo.config.mismatch import Mismatch
from megatron_dgrpo.config.objective import Objective
from megatron_dgrpo.config.rewards import Reward
from megatron_dgrpo.config.trackers import TrackerSettings

DType = Literal["float32", "bfloat16", "float64"]


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


class DefaultRope(Frozen):
    """Rotary embeddings as they are, without any stretching."""

    kind: Literal["default"]
    base: PositiveFloat | None = None
    """The model's own where none is given (rope_theta)."""


class YarnRope(Frozen):
    """YaRN: a context of factor x original_max_positions."""

    kind: Literal["yarn"]
    factor: Annotated[float, Field(ge=1)]
    """By what the context grows."""
    original_max_positions: PositiveInt
    """Context that the model was trained with."""
    base: PositiveFloat | None = None
    """The model's own where none is given (rope_theta)."""
    beta_fast: PositiveFloat = 32.0
    """Dimensions that turn more often than this in the original context stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Dimensions that turn less often than this in the original context are stretched in full."""
    attention_factor: PositiveFloat | None = None
    """Multiplies cosine and sine; 0.1 ln(factor) + 1 where none is given."""


class Llama3Rope(Frozen):
    """Llama 3's way to a context of factor x original_max_positions."""

    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)]
    """By what the context grows."""
    original_max_positions: PositiveInt
    """Context that the model was trained with."""
    base: PositiveFloat | None = None
    """The model's own where none is given (rope_theta)."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above original_max_positions / low_freq_factor are stretched in full."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below original_max_positions / high_freq_factor stay as they are."""


RopeScaling = DefaultRope | YarnRope | Llama3Rope


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


class Engine(Frozen):
    """vLLM engine hosts that serve the same: each is one process around one engine."""

    model: str
    """Name of the model it serves."""
    replicas: PositiveInt = 1
    """Hosts that share the prompts."""
    addresses: tuple[str, ...] = ()
    """Hosts that run already (`dgrpo engine`), instead of any that the run starts: tcp:HOST:PORT or unix:/PATH."""
    key_file: str | None = None
    """File with the key of the hosts at `addresses`, readable by its owner alone."""
    max_restarts: NonNegativeInt = 3
    """How often within an hour a host that died or hung is started again, before its end is that of the run."""
    hang_timeout_s: PositiveFloat = 300.0
    """A host that says nothing for so long, even when asked, hangs. It answers between steps: a step that computes the
    longest prompts must be shorter."""
    dtype: DType | None = None
    """Type of its weights; the model's own where none is given."""
    max_model_len: PositiveInt
    """Longest prompt plus response, in tokens."""
    kv_cache_bytes: PositiveInt = 2**28
    """Memory for keys and values, on each of its ranks."""
    max_num_seqs: PositiveInt = 256
    """Sequences generated at the same time."""
    prefix_cache: bool = True
    """Compute a prompt once for all of its samples."""
    chunked_prefill: PositiveInt | None = None
    """Compute prompts in pieces, of at most so many tokens a step for all sequences together (none: each prompt in one
    piece, with memory for all of it)."""
    threads: PositiveInt = 1
    """CPU threads of the host, or of each of its ranks, where it runs on CPU."""
    tp: PositiveInt = 1
    """Ranks over which the model is cut, each a process of its own."""
    start_timeout_s: PositiveFloat = 600.0
    """How long the host may take to be ready."""
    request_timeout_s: PositiveFloat = 1800.0
    """How long a batch of requests may take."""
    bucket_bytes: PositiveInt = 2**24
    """Weights arrive in buckets of this size; two are in flight."""
    checksums: bool = False
    """Compare a checksum of every tensor on both sides of each transfer of weights."""


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


class Adam(Frozen):
    """Megatron's distributed AdamW; norms and biases do not decay."""

    lr: NonNegativeFloat
    """Learning rate after the warm-up; constant from there."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_grad: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""


class Sampling(Frozen):
    """How responses are drawn. The same temperature divides the student's and the teacher's logits in training."""

    max_tokens: PositiveInt
    """Longest response, the end-of-sequence token included."""
    temperature: Annotated[float, Field(ge=0.01, le=2.0)] = 1.0
    """0.01 to 2, which is vLLM's range."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: NonNegativeInt = 0
    """Draw from so many of the likeliest tokens (0: all)."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens that the response has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens once for each time that the response has them."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that the prompt or the response has."""

    @property
    def shaping(self) -> dict[str, float]:
        """All that changes the distribution beside the temperature."""
        return self.model_dump(exclude={"max_tokens", "temperature"})

    @property
    def shapes(self) -> list[str]:
        """The settings among them that are not at their defaults, and so change something."""
        return [
            f"{name}={value:g}"
            for name, value in self.shaping.items()
            if value != type(self).model_fields[name].default
        ]


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


class Stage(Frozen):
    data: Dataset
    steps: NonNegativeInt
    """Batches to train on."""
    optimizer: Adam
    micro_batch_tokens: PositiveInt = 8192
    """Sequences are packed into micro-batches of at most so many tokens (on all context-parallel ranks together). A
    prompt counts once for all of its responses; a group that is larger is cut into several, each with the prompt."""
    on_overlong: Literal["error", "drop"] = "error"
    """A sequence that is longer than a micro-batch or the model's context ends the run, or is dropped and counted."""


class SFT(Stage):
    """Supervised fine-tuning: negative log-likelihood of the answers, a mean over the batch's answer tokens."""

    kind: Literal["sft"]
    batch_size: PositiveInt
    """Examples a step."""


class Synchronous(Frozen):
    """Generate the whole batch, then train on it: the engine waits for the trainer, and the trainer for the engine."""

    kind: Literal["synchronous"] = "synchronous"


class Periodic(Frozen):
    """Train on groups that have ended while others still generate, and update once all have: the gradient is the
    synchronous schedule's, and every sample is from the weights that it changes."""

    kind: Literal["periodic"] = "periodic"
    chunk_groups: PositiveInt = 4
    """Train when so many groups have ended, or all. A group is a prompt's responses; each data-parallel rank should
    get some."""
    groups_in_memory: PositiveInt = 64
    """Groups that have ended and wait for the trainer; more wait on the disk, in the journal. No chunk is larger."""


def _schedule(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Schedule = Annotated[Synchronous | Periodic, Field(discriminator="kind"), BeforeValidator(_schedule)]


class DGRPO(Stage):
    """Rollouts, rewards, teacher, update, weight transfer."""

    kind: Literal["dgrpo"]
    engine: str
    prompts_per_step: PositiveInt
    """Prompts of a batch, each with `group_size` responses."""
    group_size: Annotated[int, Field(ge=2)]
    """Responses per prompt (G)."""
    schedule: Schedule = Synchronous()
    """How generating and training follow each other; a kind's name alone, or a mapping with its settings."""
    updates_per_batch: PositiveInt = 1
    """Optimizer updates per batch of rollouts; each takes an equal share of the prompts."""
    sampling: Sampling
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    objective: Objective = Objective()
    mismatch: Mismatch = Mismatch()
    """What is done where the trainer's log-probs of the sampled tokens differ from the engine's."""
    preflight: bool = True
    """Before the first update, check on its batch that the teacher's signal arrives and is the right one; the cost is
    about a forward of the teacher. A failed check ends the run."""
    diagnostics_every: NonNegativeInt = 50
    """Compare the norms and directions of the terms' gradients at the first step and every so many (0: never)."""


class Rollout(Frozen):
    """What holds for all engines."""

    deterministic: bool = False
    """The same bits for the same run on the same machine: an engine serves one batch at a time, from nothing that was
    before it, and one that was cut short is generated again whole."""


class Config(Frozen):
    """A run."""

    run_dir: str
    """Folder for everything that the run leaves behind; it must not exist or be empty, but for what a run leaves that
    failed before its first step (config.yaml and logs)."""
    seed: NonNegativeInt = 0
    threads_per_rank: PositiveInt = 1
    """CPU threads of each trainer rank."""
    collective_timeout_s: PositiveFloat = 600.0
    """A collective that takes longer ends the run."""
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
    evaluation: Evaluation | None = None
    trackers: tuple[TrackerSettings, ...] = ()
    """Where figures go beside metrics.jsonl: tensorboard, wandb, mlflow."""
    stages: Annotated[tuple[Annotated[SFT | DGRPO, Field(discriminator="kind")], ...], Field(min_length=1)]
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

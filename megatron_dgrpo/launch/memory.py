"""What a rank's memory goes into, in bytes, from sizes alone: the formulas of docs/dry-run.md. Imports no torch.

Parameters are counted by the building code itself (train/shapes.py). Everything else is arithmetic:

- gradients and optimizer are what Megatron's distributed optimizer keeps: a buffer of all gradients, and a part of the
  state, 1 / (dp x cp) of it, or 1 / edp for experts;
- activations are what autograd keeps of the largest micro-batch, layer by layer, times the micro-batches that a
  pipeline has in flight. What an operation needs while it runs is not counted, nor what an allocator loses;
- the head's buffers have a fixed size; teacher rows are counted for a batch whose every response has its full length.

Legend: T tokens of the largest micro-batch on one rank, w bytes of a number, wide those of float32 or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.config.schema import AnyStage, Engine, Layout, Model, OnPolicy, Teacher
from megatron_dgrpo.launch.preflight import BYTES
from megatron_dgrpo.model.layouts import padding_unit
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.rollout.fp8_format import weight_bytes


@dataclass(frozen=True)
class Held:
    """Numbers of parameters on one rank of a pipeline stage."""

    layers: int
    dense: int
    """All but those of experts; a tied head's copy on the last stage is among them."""
    experts: int
    head: int
    """Those of `dense` that are an output head of its own."""

    @property
    def all(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Sized:
    """A model with what is known of its size."""

    name: str
    model: Model
    spec: ModelSpec
    held: Sequence[Held]
    """By pipeline stage."""

    @property
    def bytes_per_number(self) -> int:
        return BYTES[self.model.dtype]

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of one of the model's ranks."""
        return rank // (self.model.layout.tp * self.model.layout.cp * self.model.layout.dp)


# ---- The student -----------------------------------------------------------------------------------------------------

_GRADIENT = {"bfloat16": 4, "float32": 4, "float64": 8}
_STATE = {"bfloat16": 12, "float32": 8, "float64": 16}
"""Of the optimizer: two moments, and a master copy in float32 of weights that are bfloat16."""


def student_parts(student: Sized, rank: int, stage: AnyStage, *, teachers: int, gpu: bool) -> dict[str, int]:
    """Bytes on one of the student's ranks, without what a teacher brings."""
    number = student.stage_of(rank)
    held, layout, w = student.held[number], student.model.layout, student.bytes_per_number
    edp = layout.tp * layout.cp * layout.dp // (layout.etp * layout.ep)
    state = _STATE[student.model.dtype]
    parts = {
        "weights": held.all * w,
        "gradients": held.all * _GRADIENT[student.model.dtype],
        "optimizer": held.dense * state // (layout.dp * layout.cp) + held.experts * state // edp,
        "activations": activations(student, number, stage.micro_batch_tokens),
    }
    if number == layout.pp - 1:
        parts["head"] = head_buffers(student, stage.micro_batch_tokens, teachers=teachers, gpu=gpu)
    return parts


def rank_tokens(model: Model, micro_batch_tokens: int) -> int:
    """Tokens of the largest micro-batch on one context-parallel rank."""
    layout = model.layout
    unit = padding_unit(tp=layout.tp, sequence_parallel=layout.sequence_parallel, fp8=model.fp8)
    return -(-micro_batch_tokens // (layout.cp * unit)) * unit


def layer_bytes(spec: ModelSpec, model: Model) -> int:
    """What autograd keeps of one layer for one token, when nothing is recomputed."""
    layout, w = model.layout, BYTES[model.dtype]
    tp, sp, wide = layout.tp, layout.tp if layout.sequence_parallel else 1, max(4, w)
    h, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    rest = 2 * h * (wide + 2 * w) / sp  # norms: the input widened, the normalised value, the output
    rest += 4 * spec.head_dim * w  # cosine and sine, for queries and for keys
    attention = (queries + 2 * keys) * w  # before rotation
    attention += (queries + keys) * (wide + w) if spec.qk_norm else 0
    attention += (queries + keys) * w + queries * w  # rotated; the output
    attention += 0 if model.recompute == "selective" else 4 * spec.num_heads  # log-sum-exps
    mlp = 5 * spec.ffn_size * w  # gate and up-projection, each once more as the activation takes them; their product
    if not spec.num_experts:
        return int(rest + (attention + mlp) / tp)
    # Routing is taken as even: each token's copies for its experts, there and back, and the experts' own.
    experts = spec.experts_per_token * (2 * h * layout.etp * w + mlp) / sp
    return int(rest + attention / tp + experts + 4 * spec.num_experts / sp)


def layers_in_flight(layout: Layout, stage: int, layers: int) -> int:
    """Layers of micro-batches whose backward has not come yet, at most, in Megatron's schedules."""
    if layout.pp == 1:
        return layers
    if layout.vpp == 1:
        return layers * (layout.pp - stage)
    chunks = (layout.pp - stage - 1) * 2 + (layout.vpp - 1) * layout.pp + 1
    return -(-layers * chunks // layout.vpp)


def activations(sized: Sized, stage: int, micro_batch_tokens: int) -> int:
    model, spec, w = sized.model, sized.spec, sized.bytes_per_number
    tokens, per_layer = rank_tokens(model, micro_batch_tokens), layer_bytes(spec, model)
    boundary = spec.hidden_size * w // (model.layout.tp if model.layout.sequence_parallel else 1)
    many = layers_in_flight(model.layout, stage, sized.held[stage].layers)
    if model.recompute == "full":  # inputs of all layers, and one layer as a whole
        return tokens * (many * boundary + per_layer)
    return tokens * many * per_layer


def head_buffers(student: Sized, micro_batch_tokens: int, *, teachers: int, gpu: bool) -> int:
    """Logits of a chunk of rows, tiles, the head's gradient apart in float32, and rows with their gradient."""
    spec, layout, w = student.spec, student.model.layout, student.bytes_per_number
    wide = max(4, w)
    columns = spec.padded_vocab_size(layout.tp) // layout.tp
    both = columns * (2 if teachers else 1)
    budget, block, tile = (2**31, 256, 8192) if gpu else (2**26, 64, 1024)
    rows = min(4096, max(block, budget // (both * wide) // block * block))
    loss_rows = rank_tokens(student.model, micro_batch_tokens)
    rows = min(rows, loss_rows)
    return (
        rows * both * wide
        + 3 * rows * min(tile, columns) * wide
        + columns * spec.hidden_size * wide
        + loss_rows * spec.hidden_size * (w + wide)
    )


# ---- The teacher -----------------------------------------------------------------------------------------------------


def teacher_parts(
    teacher: Sized, settings: Teacher, rank: int, stage: AnyStage
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on one of the teacher's own places: on the device, and in host memory. Its head is elsewhere."""
    number = teacher.stage_of(rank)
    held, w = teacher.held[number], teacher.bytes_per_number
    weights = (held.all - held.head) * w
    tokens = rank_tokens(teacher.model, stage.micro_batch_tokens)
    device = {"teacher": weights + tokens * layer_bytes(teacher.spec, teacher.model)}
    return device, {"teacher": weights} if settings.weights_in == "host" else {}


def teacher_on_student(
    teacher: Sized, settings: Teacher, student: Sized, stage: AnyStage
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on each rank of the student's last stage: the teacher's part of the vocabulary, and its rows."""
    layout, w = student.model.layout, teacher.bytes_per_number
    head = student.spec.padded_vocab_size(layout.tp) // layout.tp * teacher.spec.hidden_size * w
    rows = most_loss_rows(stage, layout) * teacher.spec.hidden_size * w
    if settings.rows_in == "host":
        return {"teacher": head}, {"rows": -(-rows // layout.tp)}
    return {"teacher": head, "rows": rows}, {}


def most_loss_rows(stage: AnyStage, layout: Layout) -> int:
    """Of one update on one data- and context-parallel rank, when no response ends before its limit."""
    if isinstance(stage, OnPolicy):
        samples = stage.prompts_per_step * stage.group_size // stage.updates_per_batch
        tokens = samples * stage.sampling.max_tokens
    else:  # were all of them the answers'
        tokens = stage.batch_tokens or (stage.batch_size or 0) * stage.micro_batch_tokens
    return -(-tokens // (layout.dp * layout.cp))


# ---- Engines and files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineMemory:
    weights: int
    kv_cache: int
    kv_per_token: int
    sequences: float
    """Of the longest length that fit at a time."""
    buckets: int
    """Shared memory of a weight transfer."""


def engine_memory(engine: Engine, dtype: str, spec: ModelSpec, parameters: int) -> EngineMemory:
    """Bytes on each rank of the engine."""
    tp, w = engine.tp, BYTES[dtype]
    per_token = 2 * spec.num_layers * max(1, spec.num_kv_heads // tp) * spec.head_dim * w
    tensors = ((rule.hf_name, rule.hf_shape) for rule in rules(spec))
    weights = weight_bytes(tensors, w) if engine.quantization else parameters * w
    return EngineMemory(
        weights=-(-weights // tp),
        kv_cache=engine.kv_cache_bytes,
        kv_per_token=per_token,
        sequences=engine.kv_cache_bytes / (per_token * engine.max_model_len),
        buckets=2 * engine.bucket_bytes,
    )


def training_checkpoint_bytes(student: Sized, parameters: int) -> int:
    """Weights and the optimizer's state, each once."""
    return parameters * (student.bytes_per_number + _STATE[student.model.dtype])

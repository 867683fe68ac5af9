"""What is found out about a run's models before any process starts. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.headers import check_tensors
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.config.stages import samplers
from megatron_dgrpo.errors import ConfigError, ConversionError, listing
from megatron_dgrpo.model.layouts import layout_problems
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.rollout.fp8_format import BLOCK

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


def check_models(config: Config, *, config_json_alone: Collection[str] = ()) -> None:
    """Architecture, tensors and layout of the student and every teacher, and whether the engines can serve the longest
    sequences that they may be asked for; all problems of all of them in one error."""
    problems, specs = [], dict[str, ModelSpec]()
    for name in dict.fromkeys([config.student, *(teacher.model for teacher in config.teachers)]):
        model = config.models[name]
        try:
            spec = read_spec(model.path, model.rope)
            if name not in config_json_alone:
                check_tensors(model.path, rules(spec), spec)
        except ConversionError as error:
            problems.append(f"models.{name}: {error}")
            continue
        specs[name] = spec
        problems += [f"models.{name}.layout: {problem}" for problem in layout_problems(spec, model.layout)]
    problems += engine_problems(config, specs, block_size=_block_size())
    for name in dict.fromkeys(section.engine for _, section in samplers(config)):
        engine = config.engines[name]
        if engine.model in specs:
            found = engine_tp_problems(specs[engine.model], engine.tp)
            problems += [f"engines.{name}.tp: {problem}" for problem in found]
    if problems:
        raise ConfigError(listing("The models can't be used as they are:", problems))


def engine_problems(config: Config, specs: Mapping[str, ModelSpec], *, block_size: int) -> Iterator[str]:
    """Of the engines that are started: vLLM finds the same, but only after its imports, and in other words."""
    for name in dict.fromkeys(section.engine for _, section in samplers(config)):
        if not config.engines[name].addresses:
            yield from _engine_problems(config, name, specs, block_size)


def check_engine(config: Config, name: str) -> None:
    """The same, of one engine that is started by itself."""
    model = config.models[config.engines[name].model]
    spec = read_spec(model.path, model.rope)
    problems = list(_engine_problems(config, name, {config.engines[name].model: spec}, _block_size()))
    if problems:
        raise ConfigError(listing("The engine can't be started as it is:", problems))


def _engine_problems(config: Config, name: str, specs: Mapping[str, ModelSpec], block_size: int) -> Iterator[str]:
    engine = config.engines[name]
    spec, length = specs.get(engine.model), engine.max_model_len
    if spec is None:
        return
    if length > spec.max_positions:
        yield (
            f"engines.{name}.max_model_len: {length} is more than the {spec.max_positions} positions of "
            f"{engine.model!r} (max_position_embeddings, or models.{engine.model}.rope); set "
            f"engines.{name}.max_model_len={spec.max_positions} or less, or stretch its rotary embeddings with "
            f"models.{engine.model}.rope"
        )
    for problem in engine_fp8_problems(spec, engine.tp) if engine.quantization else ():
        yield (
            f"engines.{name}.quantization: {problem}, and each has one scale; change engines.{name}.tp, or leave "
            "quantization out"
        )
    needed = kv_bytes(spec, length, BYTES[engine.dtype or config.models[engine.model].dtype], block_size)
    needed //= min(engine.tp, spec.num_kv_heads)
    if engine.kv_cache_bytes < needed:
        yield (
            f"engines.{name}.kv_cache_bytes: {engine.kv_cache_bytes} cannot hold one sequence of max_model_len="
            f"{length}, which takes {needed}; set engines.{name}.kv_cache_bytes={needed} or more (times the "
            f"sequences that are to run together), or lower engines.{name}.max_model_len"
        )


_VOCAB_UNIT = 64
"""vLLM pads vocabularies to a multiple of this, and then cuts them evenly."""


def engine_tp_problems(spec: ModelSpec, tp: int) -> Iterator[str]:
    """Why vLLM cannot cut a model over so many ranks. Key-value heads are copied where there are fewer than ranks."""
    padded = -(-spec.vocab_size // _VOCAB_UNIT) * _VOCAB_UNIT
    parts = {"num_attention_heads": spec.num_heads, "width of the MLP": spec.ffn_size, "padded vocabulary": padded}
    for what, size in parts.items():
        if size % tp:
            yield f"{tp} ranks cannot share a {what} of {size} evenly; set it to a divisor of {size}"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        yield (
            f"{tp} is neither a divisor nor a multiple of the {spec.num_kv_heads} key-value heads; "
            "set it to one of those"
        )


def engine_fp8_problems(spec: ModelSpec, tp: int) -> Iterator[str]:
    """Why an FP8 engine cannot have whole blocks on each of so many ranks. Scales are cut and fused as weights are:
    where a part ends within a block, vLLM refuses or reads the scale of another."""
    parts = {
        "hidden size": (spec.hidden_size, 1),
        "width of the query heads": (spec.num_heads * spec.head_dim, tp),
        "width of the key-value heads": (spec.num_kv_heads * spec.head_dim, min(tp, spec.num_kv_heads)),
        "width of the MLP": (spec.ffn_size, tp),
    }
    for what, (length, ranks) in parts.items():
        if length % (BLOCK * ranks):
            cut = f" over {ranks} ranks" if ranks > 1 else ""
            yield f"a {what} of {length}{cut} is not cut into whole blocks of {BLOCK}"


def kv_bytes(spec: ModelSpec, length: int, bytes_per_number: int, block_size: int) -> int:
    """Keys and values of one sequence in whole blocks, and the block that vLLM keeps for itself."""
    blocks = -(-length // block_size) + 1
    return blocks * block_size * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * bytes_per_number


def _block_size() -> int:
    """Tokens of a block where nobody says otherwise: vLLM's defaults on CUDA and on CPU."""
    return 16 if os.path.exists("/dev/nvidiactl") else 128

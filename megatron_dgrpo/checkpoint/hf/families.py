"""Which Hugging Face architectures are known, and how config.json becomes a `ModelSpec`.

A family is one entry of `FAMILIES`: what its decoder has that others lack, and which settings of its config.json must
have the one value that is built here. A setting that is absent has the value that transformers would give it, which is
why each entry names that too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_dgrpo.config.rope import Llama3Rope, RopeScaling, YarnRope
from megatron_dgrpo.errors import ConversionError, listing
from megatron_dgrpo.model.spec import ModelSpec, Rope, yarn_attention_factor

_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True)
class Must:
    """A setting has this value, and this one where config.json is silent."""

    be: Any
    unless_given: Any


def _by_default(value: Any) -> Must:
    return Must(value, value)


@dataclass(frozen=True)
class Family:
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    head_dim: int | None = None
    """Where config.json is silent; None: hidden_size / num_attention_heads."""
    only: Mapping[str, Must] = field(default_factory=dict)


_COMMON = {"hidden_act": _by_default("silu"), "partial_rotary_factor": _by_default(1.0)}
_NO_WINDOW = {"use_sliding_window": _by_default(False)}
_NO_BIAS = {"attention_bias": _by_default(False), "mlp_bias": _by_default(False)}

FAMILIES = {
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, only=_COMMON | _NO_WINDOW | _NO_BIAS),
    "Qwen3MoeForCausalLM": Family(
        qk_norm=True,
        experts=True,
        only=_COMMON | _NO_WINDOW | _NO_BIAS | {"decoder_sparse_step": _by_default(1), "mlp_only_layers": Must([], [])},
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True, only=_COMMON | _NO_WINDOW),
    "LlamaForCausalLM": Family(only=_COMMON | _NO_BIAS),
    "MistralForCausalLM": Family(only=_COMMON | {"sliding_window": Must(None, 4096)}),
}


def read_spec(folder: str | Path, rope: RopeScaling | None = None) -> ModelSpec:
    """The spec of the model in a Hugging Face folder, with its rotary embeddings or others in their place.

    Every reason why the model can't be used is listed.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist: is {folder} a Hugging Face model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}): copy the folder again") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds no JSON object: copy the folder again")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConversionError(f"{path} has architectures={architectures!r}, which is no list of names: copy it again")
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        raise ConversionError(
            f"{path} names the architecture {', '.join(architectures) or '(none)'}; known here: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[known[0]]
    if "num_local_experts" in config:  # transformers 5 saves it by this name
        config.setdefault("num_experts", config["num_local_experts"])
    problems = _mistyped(config) + _refused(config, family, known[0]) + _missing(config, family)
    own = _rope(config, problems)
    if problems:
        raise ConversionError(listing(f"{path} describes a model that can't be built:", problems))
    spec = _spec(config, family, known[0], own)
    return spec if rope is None else with_rope(spec, rope)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_OPTIONAL: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "head_dim": (_is_count, "a positive whole number"),
    "max_position_embeddings": (_is_count, "a positive whole number"),
    "rms_norm_eps": (lambda value: _is_number(value) and value >= 0, "a number"),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "norm_topk_prob": (lambda value: isinstance(value, bool), "true or false"),
    "layer_types": (
        lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
        "a list of names",
    ),
}
"""Settings that have a default: what they are where they are given."""


def _mistyped(config: dict[str, Any]) -> list[str]:
    """Values of a wrong type. They are taken out, so that nobody stumbles over them; null is as good as nothing."""
    problems = []
    for key, (fits, kind) in _OPTIONAL.items():
        if key in config and not (config[key] is not None and fits(config[key])):
            value = config.pop(key)
            if value is not None:
                problems.append(f"{key}={value!r} is not {kind}")
    return problems


def _missing(config: Mapping[str, Any], family: Family) -> list[str]:
    """Numbers that are absent or wrong, and numbers that contradict one another."""
    required = (*_REQUIRED, *(_OF_EXPERTS if family.experts else ()))
    bad = [key for key in required if not _is_count(config.get(key))]
    problems = [f"{key} is missing or not a positive whole number" for key in bad]

    def contradicts(larger: str, smaller: str) -> bool:
        return larger not in bad and smaller not in bad and larger in config and smaller in config

    heads, groups, hidden = "num_attention_heads", "num_key_value_heads", "hidden_size"
    if contradicts(heads, groups) and config[heads] % config[groups]:
        problems.append(f"{heads}={config[heads]} is no multiple of {groups}={config[groups]}")
    if (
        contradicts(hidden, heads)
        and not config.get("head_dim")
        and not family.head_dim
        and config[hidden] % config[heads]
    ):
        problems.append(f"{hidden}={config[hidden]} is no multiple of {heads}={config[heads]}, and head_dim is missing")
    if family.experts and contradicts("num_experts", "num_experts_per_tok"):
        if config["num_experts_per_tok"] > config["num_experts"]:
            problems.append(
                f"num_experts_per_tok={config['num_experts_per_tok']} exceeds num_experts={config['num_experts']}"
            )
    return problems


def _refused(config: Mapping[str, Any], family: Family, name: str) -> list[str]:
    problems = []
    for key, must in family.only.items():
        value = config.get(key, must.unless_given)
        if value != must.be and not (value is None and must.be == must.unless_given):
            given = f"{key}={value!r}" + ("" if key in config else " (by default)")
            problems.append(f"{given} is not supported for {name}; supported: {json.dumps(must.be)}")
    windowed = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windowed:
        problems.append(f"layer_types has {', '.join(windowed)}; supported: full_attention")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantised weights can't be trained; take the model's unquantised weights")
    return problems


def _spec(config: Mapping[str, Any], family: Family, name: str, rope: Rope) -> ModelSpec:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelSpec(
        architecture=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=config["moe_intermediate_size" if family.experts else "intermediate_size"],
        num_heads=heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        max_positions=int(config.get("max_position_embeddings", 32768)),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        num_experts=config["num_experts"] if family.experts else 0,
        experts_per_token=config["num_experts_per_tok"] if family.experts else 0,
        normalize_router=bool(config.get("norm_topk_prob", False)),
    )


# ---- Rotary embeddings -----------------------------------------------------------------------------------------------

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = ("factor", "original_max_position_embeddings")
_YARN_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")


def _rope(config: Mapping[str, Any], problems: list[str]) -> Rope:
    """transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    settings = config.get(name) or {}
    if not isinstance(settings, dict):
        problems.append(f"{name}={settings!r} is not an object")
        settings = {}
    given = dict(settings)
    kind = given.get("rope_type", given.get("type", "default"))
    base = given.get("rope_theta", config.get("rope_theta"))
    if base is None:
        problems.append("rope_theta is missing (also from rope_parameters)")
    elif not _is_number(base) or base <= 0:
        problems.append(f"rope_theta={base!r} is not a positive number")
        base = None
    if kind not in ("default", "llama3", "yarn"):
        problems.append(f"rope type {kind!r} is not supported; supported: default, llama3, yarn")
        kind = "default"
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={given['partial_rotary_factor']} is not supported; supported: 1.0")
    for key in _YARN_OPTIONAL if kind == "yarn" else ():
        if given.get(key) is not None and not (_is_number(given[key]) and given[key] > 0):
            problems.append(f"rope type 'yarn' has {key}={given.pop(key)!r}, which is not a positive number")
    needed = {"default": (), "llama3": _LLAMA3, "yarn": _YARN}[kind]
    absent = [key for key in needed if not _is_number(given.get(key)) or given[key] <= 0]
    problems += [f"rope type {kind!r} needs {key}, a positive number" for key in absent]
    if absent or base is None or kind == "default":
        return Rope(base=float(base or 1.0))
    original = int(given["original_max_position_embeddings"])
    if kind == "llama3":
        return Rope(
            base=float(base),
            kind="llama3",
            factor=float(given["factor"]),
            original_max_positions=original,
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
        )
    factor = float(given["factor"])
    attention = given.get("attention_factor")
    if attention is None:
        attention = yarn_attention_factor(factor, given.get("mscale"), given.get("mscale_all_dim"))
    return Rope(
        base=float(base),
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        attention_factor=float(attention),
    )


def with_rope(spec: ModelSpec, settings: RopeScaling) -> ModelSpec:
    """The model with other rotary embeddings than its config.json names."""
    base = settings.base or spec.rope.base
    match settings:
        case YarnRope():
            rope = Rope(
                base=base,
                kind="yarn",
                factor=settings.factor,
                original_max_positions=settings.original_max_positions,
                beta_fast=settings.beta_fast,
                beta_slow=settings.beta_slow,
                attention_factor=settings.attention_factor or yarn_attention_factor(settings.factor),
            )
        case Llama3Rope():
            rope = Rope(
                base=base,
                kind="llama3",
                factor=settings.factor,
                original_max_positions=settings.original_max_positions,
                low_freq_factor=settings.low_freq_factor,
                high_freq_factor=settings.high_freq_factor,
            )
        case _:
            return replace(spec, rope=Rope(base=base))
    return replace(spec, rope=rope, max_positions=int(rope.factor * rope.original_max_positions))


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The form that config.json and vLLM have for it."""
    common: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.base}
    if rope.kind == "default":
        return common
    common |= {"factor": rope.factor, "original_max_position_embeddings": rope.original_max_positions}
    if rope.kind == "llama3":
        return common | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    return common | {
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
        "attention_factor": rope.attention_factor,
    }

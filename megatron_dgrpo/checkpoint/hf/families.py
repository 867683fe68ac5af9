"""Which Hugging Face architectures are known, and how config.json becomes a `ModelSpec`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dgrpo.errors import ConversionError, listing
from megatron_dgrpo.model.spec import ModelSpec, Rope

_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _rope(config: dict[str, Any], problems: list[str]) -> Rope:
    """transformers 5 writes rope_parameters; 4 wrote rope_theta and rope_scaling."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        problems.append(f"rope type {kind!r} is not supported; supported: default")
    base = parameters.get("rope_theta", config.get("rope_theta"))
    if base is None:
        problems.append("rope_theta is missing (also from rope_parameters)")
    return Rope(base=float(base or 1.0))


def _qwen3(config: dict[str, Any], problems: list[str]) -> ModelSpec:
    refused = {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    for key, only in refused.items():
        if config.get(key, only) != only:
            problems.append(f"{key}={config[key]!r} is not supported for Qwen3; supported: {only!r}")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelSpec(
        architecture="Qwen3ForCausalLM",
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, problems),
        max_positions=int(config.get("max_position_embeddings", 32768)),
        qk_norm=True,
    )


FAMILIES = {"Qwen3ForCausalLM": _qwen3}


def read_spec(folder: str | Path) -> ModelSpec:
    """The spec of the model in a Hugging Face folder; every reason why it can't be used is listed."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist: is {folder} a Hugging Face model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}): copy the folder again") from None
    architectures = config.get("architectures") or []
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        raise ConversionError(
            f"{path} names the architecture {', '.join(architectures) or '(none)'}; known here: {', '.join(FAMILIES)}"
        )
    problems = [
        f"{key} is missing or not a positive whole number"
        for key in _REQUIRED
        if not isinstance(config.get(key), int) or config[key] < 1
    ]
    spec = None if problems else FAMILIES[known[0]](config, problems)
    if spec is not None and spec.num_heads % spec.num_kv_heads:
        problems.append(
            f"num_attention_heads={spec.num_heads} is no multiple of num_key_value_heads={spec.num_kv_heads}"
        )
    if problems or spec is None:
        raise ConversionError(listing(f"{path} describes a model that can't be built:", problems))
    return spec

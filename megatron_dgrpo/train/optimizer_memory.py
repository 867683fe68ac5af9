"""Where Megatron keeps the optimizer's state, and in what: its options for it, and what they need.

Both are Megatron's own. Lower precision is a feature of Transformer Engine's FusedAdam, and offloading moves state
between a GPU and the host: without them the settings are refused by name before anything starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from megatron_dgrpo.config.optimizer import Adam
from megatron_dgrpo.config.schema import Config

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


def memory_options(settings: Adam) -> dict[str, Any]:
    """Of Megatron's OptimizerConfig."""
    options: dict[str, Any] = {}
    if (precision := settings.precision_aware) is not None:
        options |= {
            "use_precision_aware_optimizer": True,
            "main_params_dtype": _TYPES[precision.main_params],
            "exp_avg_dtype": _TYPES[precision.exp_avg],
            "exp_avg_sq_dtype": _TYPES[precision.exp_avg_sq],
        }
    if settings.cpu_offload:
        options |= {"optimizer_cpu_offload": True, "optimizer_offload_fraction": settings.cpu_offload}
    return options


def memory_problems(config: Config) -> Iterator[str]:
    """Settings that cannot run here; each begins with its dotted path."""
    has_gpu, has_te = torch.cuda.is_available(), importlib.util.find_spec("transformer_engine") is not None
    for i, stage in enumerate(config.stages):
        where, settings = f"stages.{i}.optimizer", stage.optimizer
        if settings.precision_aware is not None and not (has_gpu and has_te):
            missing = "no GPU" if not has_gpu else "no Transformer Engine"
            yield (
                f"{where}.precision_aware: is done by Transformer Engine's FusedAdam on a GPU, and there is {missing} "
                f"here; set {where}.precision_aware=null"
            )
        if settings.cpu_offload and not has_gpu:
            yield (
                f"{where}.cpu_offload: moves state from a GPU to the host, and there is no GPU here; set "
                f"{where}.cpu_offload=0"
            )

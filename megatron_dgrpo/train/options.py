"""From a model's section of the config to the model: how it is built, and the one that is trained."""

from __future__ import annotations

import torch

from megatron_dgrpo.config.schema import Config, Model
from megatron_dgrpo.model.megatron_config import BuildOptions
from megatron_dgrpo.parallel.groups import Groups
from megatron_dgrpo.train.student import Student, load_student

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def build_options(model: Model) -> BuildOptions:
    return BuildOptions(
        dtype=DTYPES[model.dtype],
        sequence_parallel=model.layout.sequence_parallel,
        vpp=model.layout.vpp,
        recompute=model.recompute,
        offload_layers=model.offload_layers,
        layers=model.layers,
        fp8=model.fp8,
    )


def load_run_student(config: Config, groups: Groups) -> Student:
    model = config.models[config.student]
    return load_student(model.path, groups=groups, options=build_options(model), rope=model.rope)

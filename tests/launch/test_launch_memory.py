"""The formulas of a dry run's table, against what autograd and Megatron's optimizer really keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.schema import DGRPO, Engine, Layout, Model, Teacher
from megatron_dgrpo.launch.dry_run import num_parameters, parse_bytes
from megatron_dgrpo.launch.memory import (
    Held,
    Sized,
    activations,
    engine_memory,
    layer_bytes,
    layers_in_flight,
    most_loss_rows,
    rank_tokens,
    student_parts,
    teacher_on_student,
    teacher_parts,
)
from megatron_dgrpo.launch.memory_table import in_words
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

SIZES = {"vocab_size": 96, "hidden": 256, "heads": 8, "kv_heads": 4, "intermediate": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
TOKENS = 128


def _kept(rank: int, world: int, folder: str, axes: dict[str, Any], dtype: str, recompute: str) -> dict[str, int]:
    """Bytes that autograd keeps of a forward, those of gradients, and those of the optimizer after a step."""
    from megatron_dgrpo.model.schedule import run_schedule
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import sequence
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.run import build_options
    from megatron_dgrpo.train.student import load_student

    from megatron_dgrpo.config.schema import Adam

    model = Model(path=folder, dtype=dtype, layout=Layout(**axes), recompute=recompute)  # type: ignore[arg-type]
    layout = model.layout
    groups = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp)
    groups.seed(0)
    student = load_student(folder, groups=groups, options=build_options(model))
    student.start_optimizer(Adam(lr=1e-3))
    student.zero_grad()
    tokens = np.random.default_rng(rank).integers(0, 90, TOKENS)
    packing = Packing(TOKENS, dp=layout.dp, multiple_of=layout.tp)
    sequences = [sequence(str(i), tokens, np.arange(TOKENS) > 0, i) for i in range(layout.dp)]
    batches = packing.micro_batches(sequences, rank=groups.grid.coordinate("dp"))
    weights = {p.untyped_storage().data_ptr() for p in student.decoder.parameters()}
    weights |= {p.main_grad.untyped_storage().data_ptr() for p in student.decoder.parameters()}
    kept: dict[int, torch.Tensor] = {}
    forward = [True]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if forward and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    def finish(hidden: torch.Tensor, batch: Any) -> tuple[torch.Tensor, None]:
        forward.clear()  # what is computed again in backward is kept for a moment alone
        return hidden.float().square().sum(), None

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_schedule(student.decoder, student.wrapped, batches, finish, forward_only=False)
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    student.update()
    optimizers = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    states: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in weights:
                    states[parameter.data_ptr()] = parameter.nbytes
        for state in optimizer.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value) and value.dim():
                    states[value.data_ptr()] = value.nbytes
    return {
        "activations": kept_bytes,
        "weights": sum(p.nbytes for p in student.decoder.parameters()),
        "gradients": sum(p.main_grad.nbytes for p in student.decoder.parameters()),
        "optimizer": sum(states.values()),
    }


def _sized(folder: Path, axes: dict[str, Any], dtype: str = "float32", recompute: str = "none") -> Sized:
    model = Model(path=str(folder), dtype=dtype, layout=Layout(**axes), recompute=recompute)  # type: ignore[arg-type]
    spec = read_spec(folder)
    (held,) = run_distributed(_holdings, 1, str(folder), model.model_dump())
    return Sized("student", model, spec, [Held(**one) for one in held])


def _holdings(rank: int, world: int, folder: str, model: dict[str, Any]) -> list[dict[str, int]]:
    from dataclasses import asdict

    import torch.distributed as dist

    from megatron_dgrpo.train.shapes import stage_holdings

    dist.destroy_process_group()
    return [asdict(one) for one in stage_holdings(read_spec(folder), Model.model_validate(model))]


SP2 = {"tp": 2, "sequence_parallel": True}
CASES = [
    ("Qwen3", {}, "float32", "none"),
    ("Qwen3", {}, "bfloat16", "none"),
    ("Llama", {}, "bfloat16", "selective"),
    ("Qwen3", SP2, "bfloat16", "none"),
    ("Llama", {"tp": 2}, "float32", "none"),
    ("Qwen3", {"dp": 2}, "bfloat16", "full"),
    ("Qwen3Moe", {}, "float32", "none"),
]


@pytest.mark.parametrize(("family", "axes", "dtype", "recompute"), CASES)
def test_what_a_rank_keeps(tmp_path: Path, family: str, axes: dict[str, Any], dtype: str, recompute: str) -> None:
    """Weights, gradients and optimizer to 2 % (buffers are padded), a layer's activations to 10 %."""
    settings = EXPERTS if "Moe" in family else {}
    measured, predicted = [], []
    for layers in (2, 4):
        folder = save_tiny(tmp_path / str(layers), family, layers=layers, **SIZES, **settings)
        sized = _sized(folder, axes, dtype, recompute)
        found = run_distributed(_kept, sized.model.layout.world_size, str(folder), axes, dtype, recompute)[0]
        stage = DGRPO.model_construct(micro_batch_tokens=TOKENS)
        parts = student_parts(sized, 0, stage, teachers=0, gpu=False)
        for name in ("weights", "gradients", "optimizer"):
            assert parts[name] == pytest.approx(found[name], rel=0.02), name
        measured.append(found["activations"])
        predicted.append(activations(sized, 0, TOKENS))
    assert predicted[1] - predicted[0] == pytest.approx(measured[1] - measured[0], rel=0.1)

"""The formulas of a dry run's table, against what autograd and Megatron's optimizer really keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.schema import DGRPO, Engine, Layout, Model, Sampling, Teacher
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
from megatron_dgrpo.model.spec import ModelSpec, Rope
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny

SIZES = {"vocab_size": 96, "hidden": 256, "heads": 8, "kv_heads": 4, "intermediate": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
TOKENS = 128


def _kept(rank: int, world: int, folder: str, axes: dict[str, Any], dtype: str, recompute: str) -> dict[str, int]:
    """Bytes that autograd keeps of a forward, those of gradients, and those of the optimizer after a step."""
    from megatron_dgrpo.config.schema import Adam
    from megatron_dgrpo.model.schedule import run_schedule
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import sequence
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.options import build_options
    from megatron_dgrpo.train.student import load_student

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
    """Weights, gradients and optimizer to 2 % (buffers are padded), a layer's activations to 3 %."""
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
    assert predicted[1] - predicted[0] == pytest.approx(measured[1] - measured[0], rel=0.03)


def test_layers_that_wait_for_their_backward() -> None:
    assert layers_in_flight(Layout(), 0, 8) == 8
    assert [layers_in_flight(Layout(pp=4), stage, 2) for stage in range(4)] == [8, 6, 4, 2]
    # Megatron's interleaved schedule: (pp - stage - 1) x 2 + (vpp - 1) x pp micro-batch parts, and the one at work
    assert [layers_in_flight(Layout(pp=2, vpp=2), stage, 4) for stage in range(2)] == [10, 6]


SPEC = ModelSpec(
    architecture="Qwen3ForCausalLM", num_layers=4, hidden_size=64, ffn_size=128, num_heads=4, num_kv_heads=2,
    head_dim=32, vocab_size=101, tied=True, norm_eps=1e-6, rope=Rope(1e4), max_positions=512, qk_norm=True,
)  # fmt: skip


def test_a_micro_batch_is_shared_and_padded() -> None:
    layout = Layout(tp=4, sequence_parallel=True, cp=3)
    assert rank_tokens(Model(path="x", layout=layout), 1000) == 336  # a third, and then the next multiple of 4
    assert rank_tokens(Model(path="x", layout=layout, fp8="tensorwise"), 1000) == 384


def test_what_a_teacher_brings() -> None:
    layout = Layout(tp=2, sequence_parallel=True, dp=2)
    student = Sized("student", Model(path="x", layout=layout), SPEC, [Held(4, 1000, 0, 0)])
    teacher = Sized("teacher", Model(path="x"), SPEC, [Held(4, 5000, 0, 700)])
    stage = DGRPO.model_construct(
        prompts_per_step=8, group_size=4, updates_per_batch=2, sampling=Sampling(max_tokens=100), micro_batch_tokens=256
    )
    assert most_loss_rows(stage, layout) == 8 * 4 * 100 // 2 // 2
    head, rows = 51 * 64 * 2, 800 * 64 * 2
    settings = Teacher(model="teacher")
    assert teacher_on_student(teacher, settings, student, stage) == ({"teacher": head, "rows": rows}, {})
    settings = Teacher(model="teacher", weights_in="host", rows_in="host")
    assert teacher_on_student(teacher, settings, student, stage) == ({"teacher": head}, {"rows": rows // 2})
    device, host = teacher_parts(teacher, settings, 0, stage)
    assert device == {"teacher": (5000 - 700) * 2 + 256 * layer_bytes(SPEC, teacher.model)}
    assert host == {"teacher": (5000 - 700) * 2}


def test_engines_and_files() -> None:
    engine = Engine(model="m", max_model_len=512, kv_cache_bytes=2**20, bucket_bytes=2**16, tp=2)
    memory = engine_memory(engine, "bfloat16", SPEC, 1000)
    assert (memory.weights, memory.kv_per_token, memory.buckets) == (1000, 2 * 4 * 1 * 32 * 2, 2**17)
    assert memory.sequences == 2**20 / (512 * 512)
    narrow = engine_memory(engine.model_copy(update={"quantization": "fp8"}), "bfloat16", SPEC, num_parameters(SPEC))
    linear = 64 * (4 * 32 * 2 + 2 * 2 * 32) + 3 * 64 * 128
    scales = 7 * 4  # every matrix of this model is within one block
    assert narrow.weights == (4 * (linear + scales) + 2 * (num_parameters(SPEC) - 4 * linear)) // 2
    assert narrow.kv_cache == memory.kv_cache
    per_layer = 64 * (4 * 32 * 2 + 2 * 2 * 32) + 2 * 32 + 3 * 64 * 128 + 2 * 64
    assert num_parameters(SPEC) == 4 * per_layer + 64 + 101 * 64


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5 KiB", 1536), ("7", 7), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_no_size() -> None:
    with pytest.raises(ValueError, match="80GiB"):
        parse_bytes("eighty")
    assert [in_words(size) for size in (7, 1536, 2**30 * 150, 2**42 * 3)] == ["7 B", "1.5 KiB", "150 GiB", "12 TiB"]

"""The optimizer against torch's AdamW, and its state through Megatron's distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dgrpo.config.schema import Adam
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

ADAM = Adam(lr=1e-2, weight_decay=0.1, clip_grad=1e9)


def _against_torch(rank: int, world: int) -> float:
    from megatron_dgrpo.train.adam import GroupStepAdam

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64)) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = GroupStepAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        gradient = torch.randn(7, dtype=torch.float64)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    return (ours - theirs).abs().max().item()


def test_equals_torch_adamw() -> None:
    assert run_distributed(_against_torch, 1)[0] < 1e-14


def _student(folder: str, world: int, tp: int) -> Any:
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    groups = Groups(tp=tp, dp=world // tp)
    groups.seed(0)
    student = load_student(folder, groups=groups, options=BuildOptions(torch.float32))
    student.start_optimizer(ADAM)
    return student


def _steps(student: Any, first: int, count: int) -> None:
    """Updates whose gradients are a function of the weight itself and the step: the same on any layout."""
    for step in range(first, first + count):
        student.zero_grad()
        for parameter in student.decoder.parameters():
            parameter.main_grad.copy_(torch.sin(parameter.data * 50 + step))
        student.update()


def _state(student: Any, *, loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": student.decoder.groups.dp_cp,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
    }
    model = student.decoder.sharded_state_dict(metadata=metadata)
    optimizer = student.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _save_and_go_on(rank: int, world: int, folder: str, checkpoint: str, tp: int) -> Any:
    from megatron.core import dist_checkpointing

    student = _student(folder, world, tp)
    _steps(student, 0, 2)
    dist_checkpointing.save(_state(student, loading=False), checkpoint)
    _steps(student, 2, 2)
    return pieces(student.decoder, "data")


def _load_and_go_on(rank: int, world: int, folder: str, checkpoint: str, tp: int, with_optimizer: bool) -> Any:
    from megatron.core import dist_checkpointing

    student = _student(folder, world, tp)
    loaded = dist_checkpointing.load(_state(student, loading=True), checkpoint)
    student.decoder.load_state_dict(loaded["model"])
    if with_optimizer:
        student.optimizer.load_state_dict(loaded["optimizer"])
    else:
        student.start_optimizer(ADAM)
    _steps(student, 2, 2)
    return pieces(student.decoder, "data")


@pytest.mark.parametrize(("world", "tp"), [(2, 2), (2, 1), (1, 1)])
def test_a_checkpoint_of_tp2_goes_on_at_any_layout(tmp_path: Path, world: int, tp: int) -> None:
    folder = save_tiny_qwen3(tmp_path / "model", vocab_size=96, random_norms=True)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    expected = whole(run_distributed(_save_and_go_on, 2, str(folder), str(checkpoint), 2))
    resumed = whole(run_distributed(_load_and_go_on, world, str(folder), str(checkpoint), tp, True))
    for name in expected:
        assert relative_error(resumed[name], expected[name]) < 1e-6, name
    if (world, tp) == (2, 2):  # and without the optimizer's state, it would show
        forgot = whole(run_distributed(_load_and_go_on, world, str(folder), str(checkpoint), tp, False))
        assert max(relative_error(forgot[name], expected[name]) for name in expected) > 1e-3


def _decay(rank: int, world: int, folder: str) -> Any:
    student = _student(folder, world, 1)
    student.zero_grad()
    student.update()
    return pieces(student.decoder, "data")


def test_only_matrices_decay(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    before = load_file(save_tiny_qwen3(tmp_path, vocab_size=96, random_norms=True) / "model.safetensors")
    after = whole(run_distributed(_decay, 1, str(tmp_path)))
    for name, weight in before.items():
        factor = 1.0 if weight.dim() == 1 else 1 - ADAM.lr * ADAM.weight_decay
        torch.testing.assert_close(after[name], weight * factor, rtol=1e-6, atol=0)

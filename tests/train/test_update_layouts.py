"""A whole update at every kind of layout: the norm of the gradient, the weights after it, and who hears of a NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Adam, Layout
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny

SIZES = {"vocab_size": 97, "heads": 4, "kv_heads": 2, "layers": 4, "std": 0.08, "random_norms": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SP = {"sequence_parallel": True}


def _examples() -> list[Trajectory]:
    draw = np.random.default_rng(3)
    return [
        Trajectory(str(i), 0, draw.integers(0, 97, 4), (Segment(draw.integers(0, 97, 3 + i % 4), True),), "stop")
        for i in range(7)
    ]


def _student_and_work(folder: str, axes: dict[str, Any]) -> Any:
    from megatron_dgrpo.algorithms.build import sft_loss, sft_streams
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import documents
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.update import Work

    layout = Layout(**axes)
    groups = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp, ep=layout.ep, etp=layout.etp)
    groups.seed(0)
    options = BuildOptions(torch.float64, sequence_parallel=layout.sequence_parallel, vpp=layout.vpp)
    student = load_student(folder, groups=groups, options=options)
    packing = Packing(24, dp=layout.dp, multiple_of=4, rounds_of=layout.pp if layout.vpp > 1 else 1)
    batches = packing.micro_batches(documents(_examples()), rank=groups.grid.coordinate("dp"))
    loss, factors = sft_loss()
    return student, Work(batches, sft_streams(_examples()).streams, loss, factors, 1.0)


def _update(rank: int, world: int, folder: str, axes: dict[str, Any]) -> Any:
    from megatron_dgrpo.train.update import compute_gradients

    student, work = _student_and_work(folder, axes)
    student.start_optimizer(Adam(lr=1e-3, clip_grad=0.5, weight_decay=0.1))
    reported = [compute_gradients(student, work) | student.update() for _ in range(2)]
    return reported, pieces(student.decoder, "data")


LAYOUTS = [
    ("Qwen3", {"dp": 2}),
    ("Qwen3", {"tp": 2, **SP}),
    ("Qwen3", {"pp": 2}),
    ("Qwen3", {"tp": 2, "pp": 2, **SP}),
    ("Qwen2", {"tp": 2, "dp": 2}),
    ("Qwen2", {"pp": 2, "vpp": 2}),
    ("Qwen3Moe", {"dp": 2, "ep": 2}),
    ("Qwen3Moe", {"tp": 2, "dp": 2, "ep": 2, **SP}),
    ("Qwen3Moe", {"dp": 2, "ep": 2, "pp": 2}),
]


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Any] = {}

    def outcome(family: str) -> tuple[Path, list[dict[str, float]], dict[str, torch.Tensor]]:
        if family not in found:
            experts = EXPERTS if family == "Qwen3Moe" else {}
            folder = save_tiny(tmp_path_factory.mktemp("model"), family, **SIZES, **experts)
            ((reported, weights),) = run_distributed(_update, 1, str(folder), {})
            found[family] = folder, reported, whole([weights])
        return found[family]

    return outcome


@pytest.mark.parametrize(("family", "axes"), LAYOUTS, ids=str)
def test_an_update_is_the_same_at_every_layout(on_one_rank: Any, family: str, axes: dict[str, Any]) -> None:
    folder, expected, weights = on_one_rank(family)
    assert all(report["grad_norm"] > 0.5 for report in expected)  # it is clipped
    ranks = run_distributed(_update, Layout(**axes).world_size, str(folder), axes)
    for reported, _ in ranks:
        assert reported == ranks[0][0]
        for report, wanted in zip(reported, expected, strict=True):
            assert report["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)  # Megatron's norm is float32
            assert report["loss"] == pytest.approx(wanted["loss"], rel=1e-8)
    updated = whole((found for _, found in ranks), tolerance=0.0)  # replicas stay equal to the bit
    for name, weight in weights.items():
        assert relative_error(updated[name], weight) <= 1e-6, name


def _with_a_nan(rank: int, world: int, folder: str, axes: dict[str, Any]) -> str:
    from megatron_dgrpo.errors import NonFiniteError
    from megatron_dgrpo.train.update import compute_gradients

    student, work = _student_and_work(folder, axes)
    for weights_N in work.streams.weights.values():
        weights_N[5] = float("nan")
    try:
        compute_gradients(student, work)
    except NonFiniteError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("axes", [{"pp": 2}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_every_rank_hears_of_a_loss_row_that_is_not_finite(tmp_path: Path, axes: dict[str, Any]) -> None:
    folder = save_tiny(tmp_path, **SIZES)
    said = run_distributed(_with_a_nan, Layout(**axes).world_size, str(folder), axes)
    assert all(text.startswith("1 loss rows are not finite") for text in said)

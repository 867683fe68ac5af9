"""Peak memory of a teacher while it is loaded and scores a batch, against what each rank must hold of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.memory import Peak

LAYERS = 2


def _save(folder: Path, *, hidden: int, vocab: int, tied: bool) -> Path:
    """A Qwen3 of random weights in bfloat16, cut out of one block of random numbers."""
    from safetensors.torch import save_file

    from megatron_dgrpo.checkpoint.hf.exporter import manifest
    from megatron_dgrpo.checkpoint.hf.families import read_spec

    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": LAYERS,
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": hidden // 128,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": vocab, "tie_word_embeddings": tied,
        "rope_theta": 1e6, "dtype": "bfloat16", "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    specs = manifest(read_spec(folder), torch.bfloat16)
    sizes = [torch.Size(spec.global_shape).numel() for spec in specs]
    block = (0.02 * torch.randn(1 << 20)).bfloat16().repeat(-(-max(sizes) // (1 << 20)))
    shaped = zip(specs, sizes, strict=True)
    save_file(
        {s.hf_name: block[:size].view(s.global_shape).clone() for s, size in shaped}, folder / "model.safetensors"
    )
    return folder


@dataclass(frozen=True)
class Case:
    student: Layout
    teacher: Layout
    tied: bool = False
    first_rank: int = 0
    placed_in: str = "device"
    dtype: torch.dtype = torch.float32

    @property
    def world(self) -> int:
        return max(self.student.world_size, self.first_rank + self.teacher.world_size)


def _trajectories(num_tokens: int) -> list[Trajectory]:
    draw = np.random.default_rng(0)
    return [
        Trajectory(str(i), 0, draw.integers(0, 64, 8), (Segment(draw.integers(0, 64, num_tokens), True),), "stop")
        for i in range(4)
    ]


def _measure(rank: int, world: int, folder: str, tiny: str, case: Case, num_tokens: int) -> tuple[int, int]:
    """Peak, and what the rank must hold. A tiny teacher goes first, so that everything is imported."""
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.parallel.groups import Groups

    layout = case.student
    student = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp)
    layout = case.teacher
    own = Groups(tp=layout.tp, dp=layout.dp, pp=layout.pp, first_rank=case.first_rank)
    next(mine for mine in (student, own) if mine.member).seed(0)
    _load_and_score(tiny, case, student, own, 4)
    with Peak() as peak:
        kept = _load_and_score(folder, case, student, own, num_tokens)
    assert (kept[1] is not None) == (kept[0].head is not None)
    return peak.bytes, _must_hold(read_spec(folder), case, student.grid, own.grid, 4 * num_tokens)


def _load_and_score(folder: str, case: Case, student: Any, own: Any, num_tokens: int) -> Any:
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.teacher.frozen import load_teacher

    teacher = load_teacher(
        folder,
        groups=own,
        options=BuildOptions(case.dtype),
        student_spec=read_spec(folder),
        student_groups=student,
        weights_in=case.placed_in,
        rows_in=case.placed_in,
    )
    return teacher, teacher.rows(trees(_trajectories(num_tokens)), Packing(256, dp=case.student.dp, multiple_of=4))


def _must_hold(spec, case: Case, student, teacher, num_rows: int) -> int:
    """From the sizes alone: layers, embedding, head, rows; of a tied model what is both is held once."""
    from megatron_dgrpo.checkpoint.hf.exporter import manifest

    sizes = {s.hf_name: torch.Size(s.global_shape).numel() for s in manifest(spec, case.dtype)}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    table, embedding, head, rows = spec.vocab_size * spec.hidden_size, set(), set(), 0
    held = layers // (teacher.tp * teacher.pp) if teacher.member else 0
    if teacher.member and teacher.first_stage:
        embedding = _share(teacher)
    if student.member and student.last_stage:
        head = _share(student)
        rows = num_rows // student.dp // (student.tp if case.placed_in == "host" else 1)
    eighths = len(embedding | head) if spec.tied else len(embedding) + len(head)
    return (held + eighths * table // 8 + rows * spec.hidden_size) * case.dtype.itemsize


def _share(grid) -> set[int]:
    """Eighths of the vocabulary that a tensor-parallel rank has."""
    size = 8 // grid.tp
    return set(range(grid.coordinate("tp") * size, (grid.coordinate("tp") + 1) * size))


CASES = {
    "one rank": Case(Layout(), Layout()),
    "one rank, tied, in host memory": Case(Layout(), Layout(), tied=True, placed_in="host"),
    "tp2, tied": Case(Layout(tp=2), Layout(tp=2), tied=True),
    "tp2 taught by pp2 on its own ranks, in host memory": Case(
        Layout(tp=2), Layout(pp=2), first_rank=2, placed_in="host"
    ),
    "dp2 taught by tp2, tied": Case(Layout(dp=2), Layout(tp=2), tied=True),
    "tp2 taught by dp2, tied, in host memory": Case(Layout(tp=2), Layout(dp=2), tied=True, placed_in="host"),
    "pp2 taught by tp2 pp2 on its own ranks, tied, bfloat16": Case(
        Layout(pp=2), Layout(tp=2, pp=2), tied=True, first_rank=2, dtype=torch.bfloat16
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path]:
    folder = tmp_path_factory.mktemp("model") / "small"
    _save(folder.with_name("tiny"), hidden=512, vocab=64, tied=request.param)
    return request.param, _save(folder, hidden=1024, vocab=16384, tied=request.param)


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_a_teacher_is_held_twice(small: tuple[bool, Path], name: str) -> None:
    case, (tied, folder) = CASES[name], small
    if case.tied != tied:
        pytest.skip("the other kind of model")
    ranks = run_distributed(_measure, case.world, str(folder), str(folder.with_name("tiny")), case, 100)
    assert all(peak <= must_hold + (24 << 20) for peak, must_hold in ranks), ranks


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        Case(Layout(), Layout()),
        Case(Layout(tp=2), Layout(tp=2), placed_in="host"),
        Case(Layout(tp=2), Layout(pp=2), first_rank=2),
        Case(Layout(dp=2), Layout(tp=2), first_rank=2, placed_in="host"),
    ],
    ids=str,
)
def test_the_peak_of_a_large_teacher(tmp_path: Path, case: Case) -> None:
    """1.3 GiB in float32."""
    tiny = _save(tmp_path / "tiny", hidden=512, vocab=64, tied=False)
    folder = _save(tmp_path / "large", hidden=2048, vocab=65536, tied=False)
    ranks = run_distributed(_measure, case.world, str(folder), str(tiny), case, 100)
    assert all(peak <= 1.25 * must_hold + (256 << 20) for peak, must_hold in ranks), ranks

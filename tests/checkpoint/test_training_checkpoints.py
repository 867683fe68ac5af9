"""Training goes on from a checkpoint as if nothing had been: bit for bit at the same layout, closely at another."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dgrpo.checkpoint.manifest import Manifest, checkpoints, contents, read_manifest, verify
from megatron_dgrpo.config.schema import Adam
from megatron_dgrpo.errors import CheckpointError
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

ADAM = Adam(lr=1e-2, weight_decay=0.1, clip_grad=1e9)
LAYOUTS = {"one": {}, "tp2": {"tp": 2}, "dp2": {"dp": 2}, "pp2": {"pp": 2}, "tp2dp2": {"tp": 2, "dp": 2}}


def _student(folder: str, layout: dict[str, int], dtype: str) -> Any:
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    groups = Groups(**({"tp": 1, "dp": 1} | layout))
    groups.seed(0)
    student = load_student(folder, groups=groups, options=BuildOptions(getattr(torch, dtype)))
    student.start_optimizer(ADAM)
    return student


def _steps(student: Any, first: int, count: int) -> None:
    """Updates whose gradients are a function of the weight itself and the step: the same on any layout."""
    for step in range(first, first + count):
        student.zero_grad()
        for parameter in student.decoder.parameters():
            parameter.main_grad.copy_(torch.sin(parameter.data.float() * 50 + step))
        student.update()


def _manifest(step: int, score: float | None = None) -> Manifest:
    return Manifest(stage=0, step=step, identities={"tokenizer": "t"}, files={}, score=score)


def _save_and_go_on(rank: int, world: int, folder: str, run: str, layout: dict[str, int], dtype: str, how: str) -> Any:
    """What is written later must not be seen in the checkpoint, however late it is written."""
    from megatron_dgrpo.checkpoint.training import Saver

    student = _student(folder, layout, dtype)
    _steps(student, 0, 2)
    saver = Saver(student.decoder, run, folder, keep_last=2, asynchronous=how == "asynchronous")
    assert saver.wait() is None
    saver.save(student.optimizer, {"step": 2, "data": {"position": [1, 2]}}, _manifest(2))
    _steps(student, 2, 2)
    saved = saver.wait()
    assert saved is not None and not saved.failure, saved
    assert saved.num_bytes > 0 and saver.wait() is None
    return pieces(student.decoder, "data"), saved.num_bytes


def _load_and_go_on(rank: int, world: int, folder: str, checkpoint: str, layout: dict[str, int], dtype: str) -> Any:
    from megatron_dgrpo.checkpoint.training import load_training

    student = _student(folder, layout, dtype)
    _steps(student, 7, 1)  # whatever was there before must not matter
    trainer = load_training(student.decoder, student.optimizer, Path(checkpoint))
    assert (trainer["step"], trainer["data"]) == (2, {"position": [1, 2]})
    _steps(student, 2, 2)
    return pieces(student.decoder, "data")


def _world(layout: dict[str, int]) -> int:
    size = 1
    for length in layout.values():
        size *= length
    return size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_qwen3(tmp_path_factory.mktemp("model"), vocab_size=96, random_norms=True))


@pytest.mark.parametrize(
    ("at", "dtype", "how"),
    [("one", "float32", "asynchronous"), ("tp2", "bfloat16", "asynchronous"), ("dp2", "bfloat16", "synchronous"),
     ("pp2", "float32", "asynchronous")],
)  # fmt: skip
def test_going_on_at_the_same_layout_is_exact(tmp_path: Path, folder: str, at: str, dtype: str, how: str) -> None:
    layout = LAYOUTS[at]
    results = run_distributed(_save_and_go_on, _world(layout), folder, str(tmp_path), layout, dtype, how)
    (checkpoint,) = checkpoints(tmp_path)
    assert checkpoint.name == "00-000002" and verify(checkpoint) == []
    assert sum(path.stat().st_size for path in contents(checkpoint)) == read_manifest(checkpoint).num_bytes
    resumed = run_distributed(_load_and_go_on, _world(layout), folder, str(checkpoint), layout, dtype)
    expected = whole([pieces for pieces, _ in results])
    for name, found in whole(resumed).items():
        assert torch.equal(found, expected[name]), name


def test_going_on_at_other_layouts(tmp_path: Path, folder: str) -> None:
    layout = LAYOUTS["tp2dp2"]
    results = run_distributed(_save_and_go_on, 4, folder, str(tmp_path), layout, "float32", "asynchronous")
    expected = whole([pieces for pieces, _ in results])
    (checkpoint,) = checkpoints(tmp_path)
    for at in ("one", "pp2", "dp2"):
        resumed = whole(
            run_distributed(_load_and_go_on, _world(LAYOUTS[at]), folder, str(checkpoint), LAYOUTS[at], "float32")
        )
        for name in expected:
            assert relative_error(resumed[name], expected[name]) < 1e-6, (at, name)


# ---- Damage --------------------------------------------------------------------------------------------------------


def _save_only(rank: int, world: int, folder: str, run: str, scores: list[float | None]) -> Any:
    from megatron_dgrpo.checkpoint.training import Saver

    student = _student(folder, {}, "float32")
    saver = Saver(student.decoder, run, folder, keep_last=2, keep_best=1)
    for step, score in enumerate(scores, 1):
        _steps(student, step, 1)
        saver.save(student.optimizer, {"step": step}, _manifest(step, score))
        saved = saver.wait()
        assert saved is not None and not saved.failure, saved
    return None


def test_the_last_and_the_best_are_kept(tmp_path: Path, folder: str) -> None:
    run_distributed(_save_only, 1, folder, str(tmp_path), [0.1, 0.7, None, 0.3, 0.2])
    assert [path.name for path in checkpoints(tmp_path)] == ["00-000005", "00-000004", "00-000002"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00-000002", "00-000004", "00-000005"]


def test_every_file_that_is_changed_truncated_or_missing_is_named(tmp_path: Path, folder: str) -> None:
    run_distributed(_save_only, 1, folder, str(tmp_path), [None])
    (checkpoint,) = checkpoints(tmp_path)
    assert verify(checkpoint) == []
    names = [path.relative_to(checkpoint) for path in contents(checkpoint)]
    assert {str(name) for name in names} >= {"model.json", "trainer.json", "weights/.metadata", "optimizer/.metadata"}
    for name in names:
        path = checkpoint / name
        whole_file = path.read_bytes()
        for damaged, says in (
            (whole_file[:-1], "truncated or was changed"),
            (bytes([whole_file[0] ^ 1]) + whole_file[1:], "its contents were changed"),
            (None, "is missing"),
        ):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            (problem,) = verify(checkpoint)
            assert problem.startswith(f"{name}: ") and says in problem
            path.write_bytes(whole_file)
    (checkpoint / "more").write_text("x")
    assert verify(checkpoint) == ["more: does not belong to it"]
    (checkpoint / "more").unlink()
    manifest = read_manifest(checkpoint)
    (checkpoint / "manifest.json").write_bytes(replace(manifest, format=99, project="9.9").encode())
    with pytest.raises(CheckpointError, match="written by version 9.9 in the format 99"):
        read_manifest(checkpoint)
    (checkpoint / "manifest.json").write_text("{")
    assert "is damaged" in verify(checkpoint)[0]
    (checkpoint / "manifest.json").unlink()
    assert "half copied" in verify(checkpoint)[0]


def _fail_to_save(rank: int, world: int, folder: str, run: str) -> Any:
    from megatron_dgrpo.checkpoint.training import Saver

    student = _student(folder, {}, "float32")
    _steps(student, 0, 1)
    saver = Saver(student.decoder, run, folder, keep_last=1)
    Path(run, "checkpoints", "00-000001").mkdir(parents=True)
    saver.save(student.optimizer, {}, _manifest(1))
    first = saver.wait()
    saver.save(student.optimizer, {}, _manifest(2))
    second = saver.wait()
    assert first is not None and second is not None
    return first.failure, second.failure


def test_a_save_that_fails_is_told_and_the_next_may_succeed(tmp_path: Path, folder: str) -> None:
    ((first, second),) = run_distributed(_fail_to_save, 1, folder, str(tmp_path))
    assert "00-000001 exists already" in first and second == ""
    assert [path.name for path in checkpoints(tmp_path)] == ["00-000002"]


def _fail_to_write(rank: int, world: int, folder: str, run: str) -> Any:
    import resource

    from megatron_dgrpo.checkpoint.training import Saver

    student = _student(folder, {"tp": 2}, "float32")
    _steps(student, 0, 1)
    saver = Saver(student.decoder, run, folder, keep_last=1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses to write on, as on a full disk
    saver.save(student.optimizer, {}, _manifest(1))
    first = saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    saver.save(student.optimizer, {}, _manifest(2))
    second = saver.wait()
    return (first.failure if first else None), (second.failure if second else None)


def test_a_rank_that_cannot_write_on_is_told_on_all_and_the_next_save_may_succeed(tmp_path: Path, folder: str) -> None:
    for first, second in run_distributed(_fail_to_write, 2, folder, str(tmp_path)):
        assert first and second == ""
    assert [path.name for path in checkpoints(tmp_path)] == ["00-000002"]
    assert os.listdir(tmp_path / "checkpoints") == ["00-000002"]


def test_a_checkpoint_exports_as_it_is(tmp_path: Path, folder: str) -> None:
    """The conversion tools take the folder for a Megatron checkpoint, which it is."""
    from megatron_dgrpo.checkpoint.megatron import read_about

    run_distributed(_save_only, 1, folder, str(tmp_path), [None])
    (checkpoint,) = checkpoints(tmp_path)
    assert read_about(checkpoint).spec.vocab_size == 96
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert verify(tmp_path / "copy") == []

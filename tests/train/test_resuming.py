"""Every file of a checkpoint damaged in every way: it is named, the folder is set aside, the one before is used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.checkpoint.manifest import MANIFEST, Manifest, checkpoints, contents, read_manifest, verify
from megatron_dgrpo.errors import CheckpointError, DGRPOError
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

Damage = Callable[[bytes], bytes | None]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES: dict[str, Damage] = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "flipped": _flipped,
    "removed": lambda content: None,
}


def _save(rank: int, world: int, model: str, run: str) -> None:
    """Two checkpoints of two ranks, after one update and after two."""
    import torch

    from megatron_dgrpo.checkpoint.training import Saver
    from megatron_dgrpo.config.schema import Adam
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    groups = Groups(tp=2, dp=1)
    groups.seed(0)
    student = load_student(model, groups=groups, options=BuildOptions(torch.bfloat16))
    student.start_optimizer(Adam(lr=1e-2))
    saver = Saver(student.decoder, run, model, keep_last=2)
    for step in (1, 2):
        student.zero_grad()
        for parameter in student.decoder.parameters():
            parameter.main_grad.fill_(step)
        student.update()
        saver.save(student.optimizer, {"stage": 0, "step": step}, Manifest(0, step, {"seed": "0"}, {}))
        saved = saver.wait()
        assert saved is not None and not saved.failure, saved


def _find(rank: int, world: int, run: str) -> Any:
    """What each damage of the newest one leads to. Rank 0 changes the files."""
    import torch.distributed as dist

    from megatron_dgrpo.train.resuming import find

    found = []
    for name, how in _damages(Path(run) / "checkpoints/00-000002"):
        copy = Path(run).with_name("copy")
        if rank == 0:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy, copy_function=os.link)  # only what is damaged takes room
            _apply(copy / "checkpoints/00-000002" / name, DAMAGES[how])
        dist.barrier()
        resumed = find(copy)
        dist.barrier()
        left = sorted(path.name for path in (copy / "checkpoints").iterdir())
        dist.barrier()
        found.append((name, how, resumed.folder and resumed.folder.name, resumed.trainer, resumed.said, left))
    return found


def _damages(folder: Path) -> Iterator[tuple[str, str]]:
    for path in (*contents(folder), folder / MANIFEST):
        for how in DAMAGES:
            if how == "longer" or path.stat().st_size:
                yield str(path.relative_to(folder)), how


def _apply(path: Path, damage: Damage) -> None:
    content = damage(path.read_bytes())
    path.unlink()  # it shares its bytes with the one that stays whole
    if content is not None:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = save_tiny_qwen3(folder / "model", vocab_size=96)
    run_distributed(_save, 2, str(model), str(folder / "run"))
    return folder / "run"


def test_whatever_is_wrong_with_the_newest_is_named_and_the_one_before_is_used(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    newest, older = checkpoints(tmp_path / "run")
    assert verify(newest) == [] and verify(older) == []
    names = {name for name, _ in _damages(newest)}
    assert {"model.json", "trainer.json", "manifest.json", "weights/.metadata", "optimizer/__1_0.distcp"} <= names
    ranks = run_distributed(_find, 2, str(tmp_path / "run"))
    assert len(ranks[0]) >= 4 * len(names)
    for name, how, folder, trainer, said, left in ranks[0]:
        assert folder == older.name and trainer == {"stage": 0, "step": 1, "optimizer_steps": 1}, (name, how)
        assert left == [older.name, f"{newest.name}.damaged"], (name, how, left)
        (words,) = said
        assert words.startswith(f"checkpoint {newest.name} is not whole; it is called {newest.name}.damaged now:")
        assert name in words, (name, how, words)
    for (*ours, _, _), (*theirs, _, _) in zip(ranks[0], ranks[1], strict=True):
        assert ours == theirs, "every rank goes on from the same"


def _find_error(rank: int, world: int, run: str) -> str:
    from megatron_dgrpo.train.resuming import find

    try:
        find(run)
    except DGRPOError as error:
        return str(error)
    return ""


def test_a_half_copied_one_is_none_and_without_another_the_run_ends(saved: Path, tmp_path: Path) -> None:
    """Copied file by file, in any order, up to any point."""
    (whole, _) = checkpoints(saved)
    names = [str(path.relative_to(whole)) for path in (*contents(whole), whole / MANIFEST)]
    for order in (sorted(names), sorted(names, reverse=True)):
        for count in range(len(names)):
            half = tmp_path / "run/checkpoints" / whole.name
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            for name in order[:count]:
                (half / name).parent.mkdir(exist_ok=True)
                os.link(whole / name, half / name)
            assert verify(half), order[:count]
    said = run_distributed(_find_error, 2, str(tmp_path / "run"))
    assert "None of the 1 checkpoints" in said[0] and "Remove that folder to begin from the start" in said[0]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"{whole.name}.damaged"]


def test_another_versions_is_left_as_it_is(saved: Path, tmp_path: Path) -> None:
    """Also where the newest is damaged, so that it comes to the one before."""
    shutil.copytree(saved, tmp_path / "run")
    newest, older = checkpoints(tmp_path / "run")
    (newest / "model.json").unlink()
    for form, project in ((1, "0.0.1"), (3, "9.0")):
        other = replace(read_manifest(saved / "checkpoints" / older.name), format=form, project=project)
        (older / MANIFEST).write_bytes(other.encode())
        said = run_distributed(_find_error, 2, str(tmp_path / "run"))
        assert all(f"was written by version {project} in the format {form}" in words for words in said)
        assert older.is_dir() and [path.name for path in checkpoints(tmp_path / "run")] == [older.name]


def test_every_bit_of_a_manifest_counts(saved: Path, tmp_path: Path) -> None:
    """None of them makes another step, score or identity of it, or another version's manifest."""
    (newest, _) = checkpoints(saved)
    content = replace(read_manifest(newest), score=1e-05).encode()
    folder = tmp_path / newest.name
    folder.mkdir()
    (folder / MANIFEST).write_bytes(content)
    assert read_manifest(folder).score == 1e-05
    for place in range(len(content)):
        changed = content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        (folder / MANIFEST).write_bytes(changed)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_manifest(folder)

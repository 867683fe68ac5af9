"""`dgrpo checkpoints`: what is there, what is whole, what goes."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from megatron_dgrpo.checkpoint.manifest import MANIFEST, Manifest, checkpoints, folder_name, hash_file
from megatron_dgrpo.checkpoint.pruning import LOCK, damaged, prune, set_aside
from megatron_dgrpo.cli import main


def made(run_dir: Path, stage: int, step: int, score: float | None = None) -> Path:
    folder = run_dir / "checkpoints" / folder_name(stage, step)
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a").write_bytes(b"x" * 1000)
    files = {"weights/a": hash_file(folder / "weights" / "a")}
    (folder / MANIFEST).write_bytes(Manifest(stage, step, {}, files, score=score).encode())
    return folder


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, 0, 50)
    newest = made(tmp_path, 1, 7, 0.25)
    assert main(["checkpoints", str(tmp_path)]) == 0
    title, first, second = capsys.readouterr().out.splitlines()
    assert title.split() == ["name", "stage", "step", "bytes", "score", "age", "state"]
    assert first.split()[:5] == ["01-000007", "1", "7", "1,000", "0.2500"] and first.endswith("not read")
    assert second.split()[:4] == ["00-000050", "0", "50", "1,000"]
    (newest / "weights" / "a").write_bytes(b"x" * 999 + b"y")  # seen only by who reads it
    assert main(["checkpoints", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 1
    said = capsys.readouterr().out
    assert "01-000007: weights/a: its contents were changed" in said and said.splitlines()[2].endswith(" whole")
    (newest / MANIFEST).unlink()
    assert main(["checkpoints", str(tmp_path)]) == 1
    assert "half copied" in capsys.readouterr().out


def test_pruning_and_setting_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        made(tmp_path, 0, step)
    set_aside(tmp_path / "checkpoints" / "00-000003")
    made(tmp_path, 0, 3)
    assert set_aside(tmp_path / "checkpoints" / "00-000003").name == "00-000003.damaged-2"
    assert main(["checkpoints", str(tmp_path), "--prune", "1"]) == 0
    said = capsys.readouterr().out
    assert "removed 00-000001" in said and "00-000003.damaged was damaged" in said
    assert [path.name for path in checkpoints(tmp_path)] == ["00-000002"] and len(damaged(tmp_path)) == 2


def test_what_a_kill_left_goes_with_the_next_pruning_unless_somebody_works_on_it(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        made(tmp_path, 0, step)
    folder = tmp_path / "checkpoints"
    for step in (1, 2):  # killed while one was removed, and while one was written
        (folder / f"00-{step:06d}").rename(folder / f".00-{step:06d}.partial")
    (folder / ".00-000002.partial" / LOCK).touch()
    with (folder / ".00-000002.partial" / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [path.name for path in prune(tmp_path, keep_last=1, keep_best=0)] == ["00-000003"]
        assert sorted(path.name for path in folder.iterdir()) == [".00-000002.partial", "00-000004"]
    assert prune(tmp_path, keep_last=1, keep_best=0) == []
    assert [path.name for path in folder.iterdir()] == ["00-000004"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (["none"], "is no folder"),
        ([str(tmp_path)], "has no checkpoints"),
        ([str(tmp_path), "--export", "newest"], "give both"),
        ([str(tmp_path), "--export", "00-000009", "--out", "x"], "has no checkpoint '00-000009'"),
        ([str(tmp_path), "--prune", "0"], "keep 1 or more"),
    ):
        assert main(["checkpoints", *arguments]) == 2
        assert says in capsys.readouterr().err

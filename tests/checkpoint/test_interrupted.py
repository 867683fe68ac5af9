"""Exports that do not come to their end: nothing under the final name, no rank left waiting, the next one works."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dgrpo.points.plan import AFTER, HALF, Fault
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.distributed import RankError
from megatron_dgrpo.testing.faults import plan
from megatron_dgrpo.testing.tiny import save_tiny_qwen3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen3(tmp_path_factory.mktemp("source"), vocab_size=97, tied=False)


def export(rank: int, world: int, source: str, target: str, trouble: dict[str, Any], megatron: bool = False) -> None:
    """With `trouble` for one rank: "kill" it, "fill" the disk, or limit the size of its "files", at the first block."""
    from megatron_dgrpo.checkpoint.hf.exporter import export_folder
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.checkpoint.megatron import save_megatron
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups

    decoder = build_decoder(read_spec(source), groups=Groups(tp=world, dp=1), options=BuildOptions(dtype=torch.float32))
    import_weights(decoder, source)
    mine = trouble if trouble.get("rank") == rank else {}
    blocks: list[int] = []

    def advance(num_bytes: int) -> None:
        blocks.append(num_bytes)
        if len(blocks) == mine.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if len(blocks) == 1 and "fill" in mine:
            filler = os.open(mine["fill"], os.O_RDWR | os.O_CREAT)
            try:
                while True:
                    os.write(filler, b"x" * 4096)
            except OSError:
                os.close(filler)

    if "files" in mine:
        resource.setrlimit(resource.RLIMIT_FSIZE, (mine["files"], resource.RLIM_INFINITY))
    if megatron:
        save_megatron(decoder, source, target)
    else:
        export_folder(decoder, source, target, torch.float32, max_shard_bytes=50_000, advance=advance)


def works_now(source: Path, target: Path) -> None:
    """The same export succeeds, and leaves nothing else."""
    run_distributed(export, 2, str(source), str(target), {})
    found = {name: t for path in target.glob("*.safetensors") for name, t in load_file(path).items()}
    expected = load_file(source / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_export_leaves_nothing_under_the_name(source: Path, tmp_path: Path, rank: int) -> None:
    target = tmp_path / "target"
    with pytest.raises(RankError, match=f"rank{rank} was killed by SIGKILL"):
        run_distributed(export, 2, str(source), str(target), {"rank": rank, "kill": 9})
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([".target.partial"], []) and (rank == 1 or left)
    works_now(source, target)


@pytest.mark.parametrize("moment", [HALF, AFTER])
def test_an_export_of_several_files_that_is_killed_at_its_index(source: Path, tmp_path: Path, moment: str) -> None:
    target = tmp_path / "folder/target"
    env = plan(tmp_path / "plan", Fault("export.index", "kill", moment, role="rank0"))
    with pytest.raises(RankError, match="rank0 was killed by SIGKILL"):
        run_distributed(export, 2, str(source), str(target), {}, env=env)
    assert [path.name for path in target.parent.iterdir()] == [".target.partial"]
    works_now(source, target)


def test_a_file_that_cannot_grow_on_one_rank(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(RankError, match=r"target could not be written \(File too large\): it needs [\d,]+ bytes") as e:
        run_distributed(export, 2, str(source), str(target), {"rank": 1, "files": 20_000})
    assert "2 of 2 ranks failed" in str(e.value) and "ConversionError" in str(e.value)
    assert list(tmp_path.iterdir()) == []
    works_now(source, target)


def test_a_checkpoint_that_cannot_grow_on_one_rank(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(RankError, match=r"target could not be written \(File too large\): it needs [\d,]+ bytes") as e:
        run_distributed(export, 2, str(source), str(target), {"rank": 1, "files": 20_000}, True)
    assert "2 of 2 ranks failed" in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"file systems can't be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(source: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 900_000)
    with pytest.raises(RankError, match=r"target needs [\d,]+ bytes, [\d,]+ are free there: free space") as caught:
        run_distributed(export, 2, str(source), str(small_disk / "target"), {})
    assert "2 of 2 ranks failed" in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_meanwhile(source: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    with pytest.raises(RankError, match=r"\(No space left on device\): it needs [\d,]+ bytes, [\d,]+ are free") as e:
        run_distributed(export, 2, str(source), str(small_disk / "target"), {"rank": 1, "fill": str(filler)})
    assert "2 of 2 ranks failed" in str(e.value)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    works_now(source, small_disk / "target")


def test_a_disk_that_cannot_be_written(source: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RankError, match=r"target could not be written \(Read-only file system\)") as caught:
        run_distributed(export, 2, str(source), str(small_disk / "target"), {})
    assert "2 of 2 ranks failed" in str(caught.value)


def test_a_place_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RankError, match=r"target could not be written \((Not a directory|File exists)\)"):
        run_distributed(export, 1, str(source), str(tmp_path / "file" / "target"), {})


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_is_there_is_not_overwritten(source: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(RankError, match="exists already; nothing was overwritten"):
        run_distributed(export, 2, str(source), str(target), {})
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert kind != "file" or target.read_text() == "mine"


def test_another_export_to_the_same_place_is_left_alone(source: Path, tmp_path: Path) -> None:
    aside = tmp_path / ".target.partial"
    aside.mkdir()
    with (aside / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RankError, match=r"\.target\.partial is being written by another process"):
            run_distributed(export, 2, str(source), str(tmp_path / "target"), {})
        assert (aside / ".lock").exists()
    works_now(source, tmp_path / "target")

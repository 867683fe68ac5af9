"""What goes to a GPU machine without network: cut into parts, checked, joined, installed by pip without an index."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_wheels", ROOT / "tools" / "gpu" / "wheels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wheels = _tool()


def _wheel(folder: Path, name: str, content: str) -> Path:
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digest = {n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=") for n, t in files.items()}
    record = "".join(f"{n},sha256={digest[n].decode()},{len(t)}\n" for n, t in files.items())
    with zipfile.ZipFile(path, "w") as file:
        for entry, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            file.writestr(entry, text)
    return path


def _broken_source(folder: Path) -> Path:
    path, text = folder / "dgrpo_broken-1.0.tar.gz", b"raise SystemExit('no compiler here')\n"
    with tarfile.open(path, "w:gz") as file:
        entry = tarfile.TarInfo("dgrpo_broken-1.0/setup.py")
        entry.size = len(text)
        file.addfile(entry, io.BytesIO(text))
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Parts of 1,000 bytes, as they arrive on the other machine."""
    home, there = tmp_path / "packed", tmp_path / "there"
    home.mkdir()
    files = [_wheel(home, "dgrpo_one", "VALUE = 1\n" * 200), _wheel(home, "dgrpo_two", ""), _broken_source(home)]
    wheels.cut(files, home, 1000, {"left_out": {"dgrpo-three": "no such file"}, "own_torch": False})
    shutil.copytree(home, there, ignore=shutil.ignore_patterns("*.whl", "*.tar.gz"))
    assert len(list(there.glob("part-*"))) == -(-sum(path.stat().st_size for path in files) // 1000) > 3
    assert all((part / "data").stat().st_size <= 1000 for part in there.glob("part-*"))
    return there


def test_installed_without_an_index(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["status", str(packed)]) == 0
    assert wheels.main(["install", str(packed), "--venv", str(packed / "venv")]) == 0
    said = capsys.readouterr().out
    assert "NOT installed: dgrpo_broken-1.0.tar.gz" in said and "NOT installed: dgrpo-three: no such file" in said
    assert "needs torch 2.13.0" in said
    python = str(packed / "venv" / "bin" / "python")
    subprocess.run([python, "-c", "import dgrpo_one, dgrpo_two; assert dgrpo_one.VALUE == 1"], check=True)


def test_parts_that_lack_or_are_damaged_are_named(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(packed / "part-001")
    data = packed / "part-002" / "data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    assert wheels.main(["status", str(packed)]) == 1
    assert "part-001, part-002 (damaged: copy it again)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2 of . parts are still to be copied"):
        wheels.main(["install", str(packed), "--venv", str(packed / "venv")])
    assert not (packed / "venv").exists()
    (packed / "part-000" / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match="two different packs"):
        wheels.main(["status", str(packed)])


def test_what_is_brought() -> None:
    lock = wheels.locked(wheels.LOCK.read_text())
    names = wheels.needed(lock, {"numpy"}, False)
    assert {"megatron-core", "transformer-engine", "transformer-engine-torch", "pytest", "onnx"} <= set(names)
    assert not {"torch", "vllm", "triton", "numpy", "nvidia-cublas"} & set(names)
    assert {"torch", "vllm"} <= set(wheels.needed(lock, set(), True))
    assert "--hash=sha256:" in lock["megatron-core"] and "==0.19.2" in lock["megatron-core"]


def test_a_rehearsal_without_a_gpu(tmp_path: Path) -> None:
    """The tests skip with a reason, and the visit says so."""
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu runs by itself")
    out = tmp_path / "out"
    visit = [
        sys.executable,
        str(ROOT / "tools" / "gpu" / "visit.py"),
        "--out",
        str(out),
        "--state",
        str(tmp_path / "state"),
    ]
    done = subprocess.run([*visit, "--only", "test_te_models"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal" in done.stdout and "0 passed, 1 of 1 skipped" in done.stdout
    assert "needs a GPU and Transformer Engine" in done.stdout and (out / "test_te_models.xml").exists()

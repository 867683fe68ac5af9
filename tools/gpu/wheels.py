#!/usr/bin/env python
"""Bring the locked GPU packages to a GPU machine without network, to which only so much can be copied at a time.

    with network:    tools/gpu/wheels.py pack --out build/gpu [--part-mib 60] [--have LIST] [--vllm]
    copy build/gpu/part-*/ over, one or more at a time, to the same place; what is there already stays
    on the machine:  tools/gpu/wheels.py status build/gpu
                     tools/gpu/wheels.py install build/gpu --venv build/gpu-venv

`pack` downloads what requirements/gpu-linux-x86_64.txt locks, by its hashes, and cuts all files, one behind the other,
into parts. Every part's folder has the manifest beside it: sizes and SHA-256 of all parts and all files. `install`
checks each of them before pip sees a file, and uses no network.

The machine's own torch, with Triton and CUDA's libraries, is kept: the virtual environment sees it. So what is brought
is Megatron-Core, Transformer Engine and what they and the tests need, without the packages in LIST (the output of
`pip list --format=freeze` there). transformer-engine-torch is a source archive, which is compiled on the machine,
against the torch beside it; that needs a compiler and CUDA's headers, and where it fails the rest is installed and the
reason is said. vLLM's wheel is compiled against exactly torch 2.13.0: --vllm brings that torch too, with all of CUDA's
libraries (several GiB, so many parts), into an environment that does not see the machine's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "gpu-linux-x86_64.txt"
MANIFEST, BLOCK = "manifest.json", 1 << 20
WANTED = {"megatron-core", "transformer-engine", "transformer-engine-torch", "pydantic", "omegaconf", "rich", "numpy"}
WANTED |= {"pyyaml", "packaging", "safetensors", "tokenizers", "transformers", "datasets", "pytest", "pytest-timeout"}
WANTED |= {"setuptools", "ninja", "nvidia-cudnn-frontend"}
TO_COMPILE = "wheel"  # not in the lock: the newest there is
OF_TORCH = re.compile(r"torch|torchaudio|torchvision|torchcodec|triton|cuda-.*|nvidia-(?!ml|cudnn-frontend).*")
PACKAGE = re.compile(r"^([a-z0-9][a-z0-9._-]*)(?:\[[^]]*\])?==(\S+)", re.MULTILINE)


# ---- With network --------------------------------------------------------------------------------------------------


def locked(text: str) -> dict[str, str]:
    """Name -> its lines in the lock."""
    starts = [found.start() for found in PACKAGE.finditer(text)]
    blocks = [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
    return {PACKAGE.match(block)[1]: block for block in blocks}  # type: ignore[index]


def needed(lock: dict[str, str], have: set[str], with_vllm: bool) -> list[str]:
    """What to bring: the wanted packages and, by the lock's `# via` lines, all that they need; not what is there."""
    if with_vllm:
        return sorted(lock)
    parents = {name: set(re.findall(r"^ +# +(?:via +)?([a-z0-9._-]+)", block, re.M)) for name, block in lock.items()}
    chosen = {name for name in WANTED if name in lock}
    while more := {n for n in lock if n not in chosen and not OF_TORCH.fullmatch(n) and parents[n] & chosen}:
        chosen |= more
    keep = {"megatron-core", "transformer-engine", "transformer-engine-torch"}
    return sorted(name for name in chosen if name in keep or name not in have)


def pack(out: Path, part_bytes: int, have: set[str], with_vllm: bool) -> None:
    lock = locked(LOCK.read_text())
    names, left_out = needed(lock, have, with_vllm), {}
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    python = environment(out / "pip", sees_this_one=True)  # a source archive asks for torch to say what it is
    for name in [*names, TO_COMPILE]:
        (out / "one.txt").write_text(lock.get(name, name))
        found = subprocess.run(
            [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation",
             *(["--require-hashes"] if name in lock else []), "--dest", str(wheels), "-r", str(out / "one.txt")],
            capture_output=True, text=True, timeout=3600,
        )  # fmt: skip
        if found.returncode:
            left_out[name] = _last(found.stderr)
        print(f"{name}: {left_out.get(name, 'ok')}", flush=True)
    (out / "one.txt").unlink(missing_ok=True)
    cut(sorted(wheels.iterdir()), out, part_bytes, {"left_out": left_out, "own_torch": with_vllm})
    sizes = json.loads((out / "part-000" / MANIFEST).read_text())["parts"]
    print(f"{len(sizes)} parts, {sum(size for size, _ in sizes) / 2**20:.0f} MiB, in {out}; left out: {left_out}")


def environment(folder: Path, *, sees_this_one: bool) -> str:
    """A virtual environment's interpreter. It may see the packages of the one that runs this, itself virtual or not."""
    venv.create(folder, with_pip=True)
    if sees_this_one:
        (site,) = folder.glob("lib/python*/site-packages")
        outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "outer.pth").write_text("".join(f"{path}\n" for path in outer))  # its own packages come first
    return str(folder / "bin" / "python")


def cut(files: list[Path], out: Path, part_bytes: int, more: dict[str, Any]) -> None:
    """The files one behind the other, in parts; each part's folder holds `data` and the manifest."""
    parts: list[list[Any]] = []
    stream = _pieces(files, part_bytes)
    for number, piece in enumerate(stream):
        folder = out / f"part-{number:03d}"
        folder.mkdir(exist_ok=True)
        (folder / "data").write_bytes(piece)
        parts.append([len(piece), hashlib.sha256(piece).hexdigest()])
    described = [[path.name, path.stat().st_size, _sha256(path)] for path in files]
    text = json.dumps({"files": described, "parts": parts, **more}, indent=1)
    for number in range(len(parts)):
        (out / f"part-{number:03d}" / MANIFEST).write_text(text)


def _pieces(files: list[Path], size: int) -> Iterator[bytes]:
    kept = b""
    for path in files:
        with path.open("rb") as file:
            while read := file.read(size - len(kept)):
                kept += read
                if len(kept) == size:
                    yield kept
                    kept = b""
    if kept:
        yield kept


# ---- On the GPU machine --------------------------------------------------------------------------------------------


def manifest(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob(f"part-*/{MANIFEST}"))
    if not found:
        raise SystemExit(f"{folder} holds no part: copy the folders part-* of `pack` there")
    if len({path.read_bytes() for path in found}) > 1:
        raise SystemExit(f"{folder} holds parts of two different packs: remove the folders part-* and copy them again")
    return json.loads(found[0].read_bytes())


def missing(folder: Path, described: dict[str, Any]) -> list[str]:
    """Parts that are not here, or not as they were packed."""
    bad = []
    for number, (size, digest) in enumerate(described["parts"]):
        path = folder / f"part-{number:03d}" / "data"
        if not path.exists():
            bad.append(f"part-{number:03d}")
        elif path.stat().st_size != size or _sha256(path) != digest:
            bad.append(f"part-{number:03d} (damaged: copy it again)")
    return bad


def join(folder: Path, described: dict[str, Any]) -> list[Path]:
    """Write the files again, checked."""
    bad = missing(folder, described)
    if bad:
        raise SystemExit(f"{len(bad)} of {len(described['parts'])} parts are still to be copied: {', '.join(bad)}")
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    count, number, part, at = len(described["parts"]), 0, b"", 0
    paths = []
    for name, size, digest in described["files"]:
        path, left = wheels / Path(name).name, size
        with path.open("wb") as file:
            while left:
                if at == len(part):
                    assert number < count, "the parts are shorter than the files"
                    part, at, number = (folder / f"part-{number:03d}" / "data").read_bytes(), 0, number + 1
                took = min(left, len(part) - at)
                file.write(part[at : at + took])
                at, left = at + took, left - took
        if _sha256(path) != digest:
            raise SystemExit(f"{name} is not what was packed: pack and copy again")
        paths.append(path)
    return paths


def install(folder: Path, into: Path) -> int:
    described = manifest(folder)
    paths = join(folder, described)
    python = environment(into, sees_this_one=not described["own_torch"])
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    pip += ["--disable-pip-version-check", "--quiet"]
    failed: dict[str, str] = dict(described["left_out"])
    wheels = [path for path in paths if path.suffix == ".whl"]
    done = subprocess.run([*pip, *map(str, wheels)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    for path in paths:
        if path.suffix != ".whl" and (reason := _compile(pip, path)):
            failed[path.name] = reason
    print(f"{sum(path.name not in failed for path in paths)} packages in {into}")
    for name, reason in failed.items():
        print(f"NOT installed: {name}: {reason}")
    if not described["own_torch"]:
        print("vLLM was not brought: it needs torch 2.13.0 (pack with --vllm); what needs it skips")
    return 0


def _compile(pip: list[str], archive: Path) -> str:
    """Install a source archive against the torch beside it; why that failed, or nothing.

    Transformer Engine's looks for a finished wheel on the network unless it is told to build. Its headers of CUDA are
    those of a toolkit where there is one, else those of the packages that came with torch.
    """
    env = os.environ | {"NVTE_FRAMEWORK": "pytorch", "NVTE_PYTORCH_FORCE_BUILD": "TRUE"}
    env |= {"MAX_JOBS": str(os.cpu_count() or 1)}
    reasons = []
    for more in ({}, {"NVTE_BUILD_USE_NVIDIA_WHEELS": "1"}):
        done = subprocess.run([*pip, str(archive)], capture_output=True, text=True, env=env | more)
        if done.returncode == 0:
            return ""
        reasons.append(next((line for line in done.stderr.splitlines() if "rror:" in line), _last(done.stderr)).strip())
    return "; ".join(dict.fromkeys(reasons))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Locked GPU packages for a machine without network")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--part-mib", type=int, default=60, help="the most that can be copied at a time")
    packing.add_argument("--have", type=Path, help="`pip list --format=freeze` of the GPU machine")
    packing.add_argument("--vllm", action="store_true", help="bring vLLM, and the torch that it is compiled against")
    for name in ("status", "install"):
        there = commands.add_parser(name)
        there.add_argument("folder", type=Path)
        if name == "install":
            there.add_argument("--venv", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.command == "pack":
        have = set(PACKAGE.findall(given.have.read_text().lower().replace("_", "-"))) if given.have else set()
        pack(given.out, given.part_mib << 20, {name for name, _ in have}, given.vllm)
        return 0
    if given.command == "install":
        return install(given.folder, given.venv)
    bad = missing(given.folder, manifest(given.folder))
    print("all parts are here" if not bad else f"still to be copied: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

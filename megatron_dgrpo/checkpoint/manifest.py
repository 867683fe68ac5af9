"""The manifest of a checkpoint: every file with its size and hash, written last. Imports no torch.

    RUN/checkpoints/SS-NNNNNN/     after step NNNNNN of stage SS
        model.json huggingface/ weights/    a Megatron checkpoint: the conversion tools take the folder as it is
        optimizer/                          master weights and moments
        trainer.json                        everything else that training goes on from
        manifest.json                       these files, and what the run was made with

A folder has its name once its manifest is in it, so that a folder without one was half copied or tampered with. A
checkpoint is whole if every file has its size and hash. Hashing reads everything: ranks share it out.

The manifest names a digest of itself, computed in this way in every format from 2 on: so a bit that has changed in it
is damage, and never another version, another step or another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_dgrpo import __version__
from megatron_dgrpo.errors import CheckpointError

MANIFEST, TRAINER, OPTIMIZER = "manifest.json", "trainer.json", "optimizer"
FORMAT = 2
_CHUNK = 2**22


class OtherFormatError(CheckpointError):
    """Another version of this project wrote it: that is no damage."""


@dataclass(frozen=True)
class Manifest:
    stage: int
    step: int
    identities: Mapping[str, str]
    """Setting -> fingerprint (identity.py)."""
    files: Mapping[str, tuple[int, str]]
    """Path in the folder -> size and SHA-256."""
    versions: Mapping[str, str] = field(default_factory=dict)
    score: float | None = None
    """Held-out reward at this step, where it was evaluated."""
    format: int = FORMAT
    project: str = __version__

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def encode(self) -> bytes:
        content = asdict(self)
        return (json.dumps(content | {"digest": _digest(content)}, indent=1, sort_keys=True) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_name(stage: int, step: int) -> str:
    return f"{stage:02d}-{step:06d}"


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every checkpoint's folder, the newest first; whether it is whole is another question."""
    found = []
    for path in (Path(run_dir) / "checkpoints").glob("*-*"):
        stage, _, step = path.name.partition("-")
        if stage.isdecimal() and step.isdecimal() and path.is_dir():
            found.append(((int(stage), int(step)), path))
    return [path for _, path in sorted(found, reverse=True)]


def hash_file(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def contents(folder: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    try:
        content = (folder / MANIFEST).read_bytes()
        found: dict[str, Any] = json.loads(content)
        digest = found.pop("digest", None)
        if found["format"] != FORMAT and (digest is None or digest == _digest(found)):
            raise OtherFormatError(
                f"{folder} was written by version {found.get('project')} in the format {found['format']}; this version "
                f"({__version__}) reads {FORMAT}: go on with that version, or export the checkpoint with it"
            )
        files = {name: (int(size), str(digest)) for name, (size, digest) in found.pop("files").items()}
        manifest = Manifest(files=files, **found)
        if manifest.encode() != content:
            raise ValueError("its digest is another one")
        return manifest
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no whole checkpoint: {MANIFEST} is missing, it was half copied") from None
    except OtherFormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error!r})") from None


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What shows without reading the files."""
    problems = []
    for name, (size, _) in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{name}: {'is missing' if isinstance(error, FileNotFoundError) else error.strerror}")
            continue
        if found != size:
            problems.append(f"{name}: has {found} bytes, not {size}: it is truncated or was changed")
    known = {folder / name for name in manifest.files}
    problems += [f"{path.relative_to(folder)}: does not belong to it" for path in contents(folder) if path not in known]
    return problems


def hash_problems(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Of these files: what differs from what was written."""
    problems = []
    for name in names:
        try:
            if hash_file(folder / name) != tuple(manifest.files[name]):
                problems.append(f"{name}: its contents were changed")
        except OSError as error:
            problems.append(f"{name}: can't be read ({error.strerror})")
    return problems


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    return size_problems(folder, manifest) or hash_problems(folder, manifest, manifest.files)


def changed(manifest: Manifest, now: Mapping[str, str]) -> list[str]:
    """Settings that name something else than when the checkpoint was written."""
    return [name for name, fingerprint in now.items() if manifest.identities.get(name, fingerprint) != fingerprint]

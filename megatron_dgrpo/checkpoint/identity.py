"""Whether what a run is resumed with is what it was started with: fingerprints of models, tokenizers and data.

A fingerprint of weights reads every file's name and size, its header, and a MiB from either end of its numbers: enough
to tell any two models apart, in a second for any size. Small files are read whole. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_dgrpo.config.data import ROW_FILES, Dataset, Source
from megatron_dgrpo.config.schema import Config

_WHOLE = 2**26
"""Files up to this size are read whole."""
_END = 2**20
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json",
)  # fmt: skip


def model_fingerprint(folder: str | Path) -> str:
    folder = Path(folder)
    return _of_files(folder, [folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def tokenizer_fingerprint(folder: str | Path) -> str:
    folder = Path(folder)
    return _of_files(folder, [folder / name for name in (*TOKENIZER_FILES, "chat_template.jinja")])


def data_fingerprint(dataset: Dataset) -> str:
    """Of what is read and how; a dataset of the hub is known by its name and revision."""
    parts = [_source(source) for source in dataset.sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source(source: Source) -> str:
    how = source.model_dump_json(exclude={"path", "on_bad_row", "retries", "timeout_s"})
    if source.path is None:
        return how
    path = Path(source.path)
    files = sorted(p for p in path.rglob("*") if p.suffix in (*ROW_FILES, ".arrow")) if path.is_dir() else [path]
    return how + _of_files(path if path.is_dir() else path.parent, files, names=path.is_dir())


def identities(config: Config) -> dict[str, str]:
    """Setting -> fingerprint, of all that a resumed run must have in common with its beginning."""
    student = config.models[config.student].path
    found = {f"models.{config.student}.path": model_fingerprint(student), "tokenizer": tokenizer_fingerprint(student)}
    for teacher in config.teachers:
        found[f"models.{teacher.model}.path"] = model_fingerprint(config.models[teacher.model].path)
    for number, stage in enumerate(config.stages):
        found[f"stages.{number}.data"] = data_fingerprint(stage.data)
    return found


def _of_files(folder: Path, files: Iterable[Path], names: bool = True) -> str:
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder) if names else ''}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            digest.update(file.read(2 * _END))
            file.seek(-_END, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()

"""Whether a teacher's token ids mean what the student's mean, from the tokenizers' files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dgrpo.config.schema import Config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The object in a file, or an empty one and what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path} does not exist"
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read: {error}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path} holds no JSON object")


def tokenizers(config: Config) -> Iterator[str]:
    """A teacher scores the student's token ids: an id must mean the same token to both."""
    student = config.models.get(config.student)
    for name in dict.fromkeys(teacher.model for teacher in config.teachers):
        teacher = config.models.get(name)
        if student is None or teacher is None or not (Path(student.path).is_dir() and Path(teacher.path).is_dir()):
            continue
        if difference := _tokenizer_difference(Path(student.path), Path(teacher.path)):
            yield f"models.{name}.path: {difference}; take a teacher with the student's tokenizer"


def _tokenizer_difference(student: Path, teacher: Path) -> str:
    ours, theirs = _vocabulary(student), _vocabulary(teacher)
    if ours is None or theirs is None:
        common = [name for name in TOKENIZER_FILES if (student / name).is_file() and (teacher / name).is_file()]
        different = [name for name in common if (student / name).read_bytes() != (teacher / name).read_bytes()]
        if not common and all(any((f / name).is_file() for name in TOKENIZER_FILES) for f in (student, teacher)):
            return "its tokenizer has another form than the student's, so that their ids cannot be compared"
        return f"{', '.join(different)} differs from the student's" if different else ""
    if changed := [i for i in sorted(ours) if theirs.get(i) != ours[i]]:
        first = changed[0]
        return (
            f"{len(changed)} of the student's {len(ours)} token ids mean something else to this teacher "
            f"(id {first}: {ours[first]!r} to the student, {theirs.get(first)!r} to the teacher)"
        )
    return ""


def _vocabulary(folder: Path) -> dict[int, str] | None:
    """Id -> token, where the folder has a tokenizer.json that says so in a known form."""
    settings, _ = read_json(folder / "tokenizer.json")
    try:
        vocabulary = settings["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [token, score] in the order of ids
            tokens = {i: str(entry[0]) for i, entry in enumerate(vocabulary)}
        else:
            tokens = {int(i): str(token) for token, i in vocabulary.items()}
        return tokens | {int(entry["id"]): str(entry["content"]) for entry in settings.get("added_tokens", [])}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None

"""Whether two models may score each other's tokens: only if both read every id as the same text.

Two tokenizers of one family that differ in a single id give a plausible, wrong KL without any error. So all of it is
compared: vocabulary, merges, normalizer, pre-tokenizer, added tokens, what a prompt starts with, what ends a response.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import ConfigError, listing

_EXAMPLES = 3


def differences(a: Tokenizer, b: Tokenizer) -> list[str]:
    """Each way in which they differ, with examples; empty when they are the same."""
    one, two = a.describe(), b.describe()
    found = [*_of_vocabularies(one["vocabulary"], two["vocabulary"]), *_of_added(one["added"], two["added"])]
    if _normal(one["merges"]) != _normal(two["merges"]):
        found.append(f"merges differ ({_count(one['merges'])} and {_count(two['merges'])} of them)")
    for part in ("stages", "roles"):
        for name, value in one[part].items():
            if value != two[part][name]:
                found.append(f"{name}: {_short(value)} and {_short(two[part][name])}")
    return found


def check_same(named: dict[str, Tokenizer]) -> None:
    """All of these models must have the tokenizer of the first."""
    (first, reference), *others = named.items()
    problems = [
        f"{first} ({reference.folder}) and {name} ({other.folder}): {difference}"
        for name, other in others
        for difference in differences(reference, other)
    ]
    if problems:
        title = (
            "a teacher scores the student's token ids, so both need one tokenizer; take models that share one, since:"
        )
        raise ConfigError(listing(title, problems))


def check_fits(name: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Every id of the tokenizer must have a row in the model's embedding."""
    if tokenizer.num_ids > vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} ({tokenizer.folder}) has ids up to {tokenizer.num_ids - 1}, and the model a "
            f"vocabulary of {vocab_size}: the folder holds the tokenizer of another model"
        )


def _of_vocabularies(a: dict[str, int], b: dict[str, int]) -> list[str]:
    found = []
    if only := sorted(a.keys() - b.keys()):
        found.append(f"{len(only)} tokens only in the first: {_examples(only)}")
    if only := sorted(b.keys() - a.keys()):
        found.append(f"{len(only)} tokens only in the second: {_examples(only)}")
    if moved := [token for token in a.keys() & b.keys() if a[token] != b[token]]:
        shown = [f"{token!r} is {a[token]} and {b[token]}" for token in sorted(moved, key=a.__getitem__)[:_EXAMPLES]]
        found.append(f"{len(moved)} tokens with different ids: {', '.join(shown)}")
    return found


def _of_added(a: dict[int, Any], b: dict[int, Any]) -> list[str]:
    differing = sorted(i for i in a.keys() | b.keys() if a.get(i) != b.get(i))
    if not differing:
        return []
    shown = [f"id {i} is {_added(a.get(i))} and {_added(b.get(i))}" for i in differing[:_EXAMPLES]]
    return [f"{len(differing)} added tokens: {', '.join(shown)}"]


def _added(token: tuple[str, bool] | None) -> str:
    return "none" if token is None else f"{token[0]!r}{' (special)' if token[1] else ''}"


def _normal(merges: list[Any] | None) -> list[tuple[str, ...]] | None:
    """Merges are written as pairs or, in older files, as text with a space between."""
    return None if merges is None else [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def _count(merges: list[Any] | None) -> int:
    return len(merges or [])


def _examples(tokens: list[str]) -> str:
    return ", ".join(map(repr, tokens[:_EXAMPLES])) + (", ..." if len(tokens) > _EXAMPLES else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."

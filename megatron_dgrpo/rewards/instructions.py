"""Verifiable constraints: each is a pure function of the response and the constraint's settings."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.config.constraints import Bullets, Constraint, Ends, Format, Keywords, Language, Length
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.json_form import last_fenced, parse_json
from megatron_dgrpo.rewards.language import language_of

_LISTED: TypeAdapter[list[Constraint]] = TypeAdapter(list[Annotated[Constraint, Field(discriminator="kind")]])
_BULLET = re.compile(r"\s*[-*+\u2022]\s+\S")
_NUMBERED = re.compile(r"\s*\d+[.)]\s+\S")
_MARKDOWN = re.compile(r"^#{1,6}\s|^\s*```|^\s*\|.*\|\s*$|\*\*\S|__\S", re.MULTILINE)


class Instructions:
    def __init__(self, config: settings.Instructions) -> None:
        self._config = config

    def score(self, sample: Sample) -> float:
        constraints = [*self._config.constraints, *self._of_row(sample)]
        if not constraints:
            raise RewardError("there is no constraint, neither in the settings nor in the row")
        met = [meets(sample.text, constraint) for constraint in constraints]
        return float(all(met)) if self._config.score == "all" else sum(met) / len(met)

    def _of_row(self, sample: Sample) -> list[Constraint]:
        if self._config.field is None:
            return []
        try:
            return _LISTED.validate_python(sample.field_of(self._config.field))
        except ValidationError as error:
            raise RewardError(
                f"the row's field {self._config.field!r} is no list of constraints: {error!s:.500}"
            ) from None


def meets(text: str, constraint: Constraint) -> bool:
    text = text.strip()
    match constraint:
        case Length():
            return _between(count(text, constraint.unit), constraint.at_least, constraint.at_most)
        case Keywords():
            counts = [len(re.findall(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE)) for w in constraint.words]
            return all(_between(found, constraint.at_least, constraint.at_most) for found in counts)
        case Format():
            return has_form(text, constraint.form)
        case Bullets():
            items = sum(bool(_BULLET.match(line) or _NUMBERED.match(line)) for line in text.splitlines())
            return _between(items, constraint.at_least, constraint.at_most)
        case Ends():
            return text.startswith(constraint.starts_with.strip()) and text.endswith(constraint.ends_with.strip())
        case Language():
            return language_of(text) == constraint.language


def _between(value: int, at_least: int, at_most: int | None) -> bool:
    return at_least <= value and (at_most is None or value <= at_most)


def count(text: str, unit: str) -> int:
    match unit:
        case "words":
            return len(text.split())
        case "characters":
            return len(text)
        case "sentences":
            return sum(
                any(c.isalnum() for c in part) for part in re.split(r"[.!?]+(?=\s|$)|[\u3002\uff01\uff1f]", text)
            )
        case "paragraphs":
            return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))
        case _:
            return sum(bool(line.strip()) for line in text.splitlines())


def has_form(text: str, form: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    match form:
        case "json":
            try:
                return isinstance(parse_json(last_fenced(text) or text), dict | list)
            except ValueError:
                return False
        case "bullets":
            return bool(lines) and all(map(_BULLET.match, lines))
        case "numbered":
            return bool(lines) and all(map(_NUMBERED.match, lines))
        case "title":
            return bool(lines) and re.fullmatch(r"<<[^<>\s][^<>]*>>|#{1,6}\s+\S.*", lines[0].strip()) is not None
        case "quoted":
            return len(text) > 2 and text[0] in '"\u201c' and text[-1] in '"\u201d'
        case "upper":
            return any(map(str.isupper, text)) and not any(map(str.islower, text))
        case "lower":
            return any(map(str.islower, text)) and not any(map(str.isupper, text))
        case "no_commas":
            return bool(text) and not re.search("[,\uff0c\u3001]", text)
        case _:
            return bool(text) and _MARKDOWN.search(text) is None

"""Turns pydantic's findings into sentences for the person who wrote the file: where, what is wrong, what to write.

pydantic locates a finding by a tuple in which the tag of a union stands like a key (`stages, 0, dgrpo, sampling`).
`_locate` walks the schema beside it, which leaves the tag out and finds the model that owns the key, and with it the
keys that would have been right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

KIND = "kind"
"""The field by which the members of every union in the schema are told apart."""

_PLAIN = {  # pydantic's words about JSON, in those of YAML
    "a valid array": "a list",
    "an object": "a mapping (key: value)",
    "a valid dictionary": "a mapping (key: value)",
    "a valid boolean": "true or false",
    "a valid string": "a string",
    "a valid integer": "an integer",
    "a valid number": "a number",
}


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest choice, else the choices themselves."""
    known = sorted(choices)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(map(repr, known))}" if known else "; there are none"


@dataclass(frozen=True)
class _Place:
    keys: tuple[int | str, ...]  # as the raw data has them
    owner: type[BaseModel] | None  # the model that has, or would have, the last key
    field: FieldInfo | None
    annotation: Any

    @property
    def path(self) -> str:
        return ".".join(map(str, self.keys))


def explain(error: ValidationError, schema: type[BaseModel]) -> dict[str, str]:
    """Dotted path -> sentence, for every finding."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        place = _locate(schema, detail["loc"])
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # only because its entries are wrong, which is said of each
        found.setdefault(place.path, f"{place.path or 'the file'}: {_sentence(detail, place, schema)}")
    return found


def likely_kinds(error: ValidationError, schema: type[BaseModel]) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """For unions whose kind is unknown: where, and the likeliest kind.

    pydantic looks no further into such a part. With a kind in place, everything else that is wrong there shows as well.
    """
    for detail in error.errors(include_url=False):
        if detail["type"] == "union_tag_invalid":
            place = _locate(schema, detail["loc"])
            kinds = _kinds(place.annotation)
            if close := difflib.get_close_matches(str(detail["input"][KIND]), kinds, n=1, cutoff=0.6):
                yield place.keys, close[0]


def _sentence(detail: Any, place: _Place, schema: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    key = place.path.rpartition(".")[2]
    if kind == "value_error":  # a validator's own words
        return str(detail["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"unknown key{_right_key(key, place.owner, schema)}"
    if kind == "missing":
        return f"missing; add it{_about(place)}"
    if kind == "union_tag_not_found":
        return f"{KIND} is missing; add it: {' or '.join(_kinds(place.annotation))}"
    if kind == "union_tag_invalid":
        return f"{KIND} {value[KIND]!r} is unknown{nearest(str(value[KIND]), _kinds(place.annotation))}"
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(_bare(place.annotation))]
        return f"{value!r} is unknown{nearest(str(value), choices)}"
    if kind in ("too_short", "too_long"):
        context = detail["ctx"]
        bound = f"least {context['min_length']}" if kind == "too_short" else f"most {context['max_length']}"
        return f"has {len(value)} entries and needs at {bound}{_about(place)}"
    said = detail["msg"].replace("Input should be", "should be")
    for theirs, ours in _PLAIN.items():
        said = said.replace(f"should be {theirs}", f"should be {ours}")
    return f"{_short(value)} {said[0].lower()}{said[1:]}{_hint(value, kind)}{_about(place)}"


def _hint(value: Any, kind: str) -> str:
    if isinstance(value, float) and value.is_integer() and kind.startswith("int"):
        return f"; write {int(value)}"
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type"):
        text = value.strip().lower()
        if text in ("true", "false") or text.removeprefix("-").replace(".", "", 1).isdecimal():
            return f"; remove the quotes: {text}"
    if isinstance(value, int) and kind == "string_type":
        return f'; quote it: "{value}"'
    return ""


def _right_key(key: str, owner: type[BaseModel] | None, schema: type[BaseModel]) -> str:
    """The nearest key of the same section, else the same key where it does belong, else all keys of the section."""
    here = list(owner.model_fields) if owner else []
    if close := difflib.get_close_matches(key, here, n=1, cutoff=0.6):
        return f"; did you mean {close[0]!r}?"
    elsewhere: dict[str, dict[str, None]] = {}
    unions: dict[str, frozenset[str]] = {}
    for path, kind, union in _all_paths(schema):
        if path.rpartition(".")[2] == key:
            elsewhere.setdefault(path, {})[kind] = None
            unions[path] = union
    if elsewhere:
        places = [
            path if kinds.keys() == unions[path] else f"{path} of kind {' or '.join(kinds)}"
            for path, kinds in elsewhere.items()
        ]
        return f"; it belongs at {' or at '.join(places)}"
    return f"; the keys here are {', '.join(here)}"


def _all_paths(
    model: type[BaseModel], prefix: str = "", kind: str = "", union: frozenset[str] = frozenset({""})
) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Every key of the schema with the kind of the union's member that it is part of, and all kinds of that union."""
    for name, field in model.model_fields.items():
        yield prefix + name, kind, union
        yield from _paths_below(field.annotation, prefix + name, kind, union)


def _paths_below(
    annotation: Any, path: str, kind: str, union: frozenset[str]
) -> Iterator[tuple[str, str, frozenset[str]]]:
    arms = _arms(annotation)
    for arm in arms:
        origin, arguments = get_origin(arm), get_args(arm)
        if isinstance(arm, type) and issubclass(arm, BaseModel):
            if len(arms) == 1:
                yield from _all_paths(arm, f"{path}.", kind, union)
            for own in _kinds(arm) if len(arms) > 1 else ():
                yield from _all_paths(arm, f"{path}.", own, frozenset(_kinds(annotation)))
        elif origin is dict:
            yield from _paths_below(arguments[1], f"{path}.NAME", kind, union)
        elif origin is tuple and Ellipsis in arguments:
            yield from _paths_below(arguments[0], f"{path}.N", kind, union)


def _locate(schema: type[BaseModel], loc: Sequence[int | str]) -> _Place:
    """Walk the schema along pydantic's location."""
    annotation: Any = schema
    keys: list[int | str] = []
    owner: type[BaseModel] | None = None
    field: FieldInfo | None = None
    for key in loc:
        arms = _arms(annotation)
        if len(arms) > 1 and key in _kinds(annotation):
            annotation = next(arm for arm in arms if key in _kinds(arm))
            continue
        bare = _bare(annotation)
        keys.append(key)
        owner = field = None
        if isinstance(bare, type) and issubclass(bare, BaseModel):
            owner, field = bare, bare.model_fields.get(str(key))
            annotation = field.annotation if field else None
        else:
            arguments = get_args(bare)
            annotation = arguments[1 if get_origin(bare) is dict else 0] if arguments else None
    return _Place(tuple(keys), owner, field, annotation)


def _arms(annotation: Any) -> list[Any]:
    """The alternatives of a union, None apart; one for any other annotation."""
    if get_origin(annotation) is Annotated:
        return _arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [arm for part in get_args(annotation) if part is not NoneType for arm in _arms(part)]
    return [annotation]


def _bare(annotation: Any) -> Any:
    return _arms(annotation)[0]


def _kinds(annotation: Any) -> list[str]:
    """The kinds of a union's members, or of one model."""
    models = [arm for arm in _arms(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)]
    fields = [model.model_fields[KIND] for model in models if KIND in model.model_fields]
    return [kind for field in fields for kind in get_args(field.annotation)]


def _about(place: _Place) -> str:
    description = place.field.description if place.field else None
    return f" ({' '.join(description.split()).split('. ')[0].rstrip('.')})" if description else ""


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing (an empty or null value)"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

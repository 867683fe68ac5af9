"""Write docs/config.md from the schema: every key with its type, default and meaning.

python tools/config_reference.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_dgrpo.config.schema import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEAD = """\
# Settings

<!-- Written by tools/config_reference.py from the schema; change the schema, not this page. -->

A config is YAML with the keys of [`Config`](#config). A key without a default must be given. Where a value comes in
kinds, it is a mapping whose `kind` says which, with that kind's keys. On the command line `key=value` replaces a value,
with the key dotted: `stages.0.steps=100`. Whatever is wrong is said before anything starts, all at once.
"""


def reference() -> str:
    sections = [section(model) for model in models(Config)]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def models(root: type[BaseModel]) -> list[type[BaseModel]]:
    """The root and all that its keys lead to, in the order in which they are met."""
    found: dict[type[BaseModel], None] = {root: None}
    for model in iter_growing(found):
        for field in model.model_fields.values():
            found.update(dict.fromkeys(models_in(field.annotation)))
    return list(found)


def iter_growing(found: dict[type[BaseModel], None]) -> Iterator[type[BaseModel]]:
    number = 0
    while number < len(found):
        yield list(found)[number]
        number += 1


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def section(model: type[BaseModel]) -> str:
    lines = [f"## {model.__name__}", ""]
    if model.__doc__:
        lines += [flat(model.__doc__), ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", words(field.annotation, field.metadata), default(field), flat(field.description or ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def flat(text: str) -> str:
    return " ".join(text.split())


def default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = {name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set}
        if "kind" in type(value).model_fields:
            given = {"kind": value.kind, **given}  # type: ignore[attr-defined] # it has the field
        return f"`{given}`".replace("'", "") if given else f"all of [{type(value).__name__}](#{anchor(type(value))})'s"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"`{flat(value)[:60]}{'...' if len(flat(value)) > 60 else ''}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def words(annotation: Any, metadata: list[Any]) -> str:
    """A type as the user writes it, with its bounds."""
    text, bounds = name_of(annotation), limits(metadata)
    return f"{text} {bounds}" if bounds else text


def name_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(arguments[0], [part for more in arguments[1:] for part in getattr(more, "metadata", [more])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(name_of(part) for part in arguments if part is not NoneType))
    if origin is tuple:
        parts = [part for part in arguments if part is not Ellipsis]
        return f"list of {name_of(parts[0])}" if Ellipsis in arguments else f"list of {len(parts)} numbers"
    if origin is dict:
        return f"mapping of names to {name_of(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        label = ", ".join(map(str, get_args(kind.annotation))) if kind is not None else annotation.__name__
        return f"[{label}](#{anchor(annotation)})"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{value.value}`" for value in annotation)
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, str(annotation))


def anchor(model: type[BaseModel]) -> str:
    return model.__name__.lower()


_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "with {} at least"}


def limits(metadata: list[Any]) -> str:
    found = []
    for part in metadata:
        for name, form in _BOUNDS.items():
            value = getattr(part, name, None)
            if value is not None:
                found.append(form.format(value))
    return ", ".join(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is not up to date")
    text = reference()
    if parser.parse_args().check:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

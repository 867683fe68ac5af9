"""Whether a response is JSON, has keys, meets a schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample

_FENCE = re.compile(r"^```[\w-]*[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def last_fenced(text: str) -> str | None:
    """What stands in the last whole ``` block."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else None


def parse_json(text: str) -> Any:
    """ValueError unless it is JSON as the standard has it: no NaN, no key twice, no depth that ends the parser."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class JsonValid:
    def __init__(self, config: settings.JsonValid) -> None:
        self._config = config
        self._validator = _validator(config.schema_file) if config.schema_file else None

    def score(self, sample: Sample) -> float:
        text = sample.text
        if self._config.fenced and (block := last_fenced(text)) is not None:
            text = block
        try:
            value = parse_json(text)
        except ValueError:
            return 0.0
        if self._config.required and not (isinstance(value, dict) and value.keys() >= set(self._config.required)):
            return 0.0
        return float(self._validator is None or self._validator.is_valid(value))


def _validator(path: str) -> Any:
    try:
        import jsonschema
    except ModuleNotFoundError as error:
        raise RewardError(
            f"json_valid.schema_file needs the package jsonschema ({error}): install the extra `rewards`"
        ) from None
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        raise RewardError(f"schema_file {path} is no JSON Schema: {error!s:.300}") from None
    return kind(schema)

"""YAML and dotted overrides to a `Config`, and back. Everything that is wrong is said at once.

OmegaConf reads the YAML (it refuses duplicate keys, and 1e-6 is a number), applies `${...}` and nothing else: the
schema alone says what a key means. Relative paths stay as they are: relative to the folder in which the command runs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from megatron_dgrpo.config.explain import KIND, explain, likely_kinds
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.errors import ConfigError, listing


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config; each override is `key=value`, the key dotted (`stages.0.steps=3`), the value YAML."""
    return assemble(read_raw(Path(path)), overrides, what=str(path))


def assemble(raw: dict[str, Any], overrides: Iterable[str] = (), *, what: str) -> Config:
    """The same of what a YAML file would hold; `what` is what messages call it."""
    problems: list[str] = []
    for override in overrides:
        try:
            _override(raw, override)
        except ConfigError as error:
            problems.append(str(error))
    unresolved: dict[str, str] = {}
    data = _resolve(OmegaConf.create(raw), "", unresolved)
    problems += unresolved.values()
    config, found = _validate(data)
    # What could not be resolved is left out of the data: that it is missing there is no second problem.
    problems += [sentence for where, sentence in found.items() if not any(_within(where, bad) for bad in unresolved)]
    if problems or config is None:
        raise ConfigError(listing(f"{what} cannot be used:", problems))
    return config


def dump(config: Config) -> str:
    """The whole config as YAML, defaults included; loading it gives an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(config.model_dump(mode="json"))))


def read_raw(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist (looked from {Path.cwd()}); give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a text file: {error}; give the path of a YAML file") from error
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = "; ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: {said}; {_yaml_remedy(error.problem or '')}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path} is not the YAML of a config: {error}; write `key: value` lines") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a list; a config is `key: value` lines")
    raw = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(raw, dict)
    return {str(key): value for key, value in raw.items()}


def _yaml_remedy(problem: str) -> str:
    if "duplicate key" in problem:
        return "keep one of them"
    if r"\t" in problem or "tab character" in problem:
        return "indent with spaces, not with tabs"
    return "correct the YAML there, or on the line before"


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one value in the raw data. Sections that the file leaves out are made; list entries must exist."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: write it as key=value, for instance stages.0.steps=100")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"override {override!r}: the value is not YAML: {said}; quote it") from error
    node: Any = raw
    parts = key.split(".")
    done: list[str] = []
    while parts:
        if isinstance(node, dict):
            # A name may hold dots ("qwen3-0.6b"): the longest that exists is meant, else the one up to the next dot.
            taken = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
            here: Any = ".".join(parts[:taken])
        elif isinstance(node, list):
            taken, here = 1, _index(parts[0], node, override, ".".join(done))
        else:
            raise ConfigError(
                f"override {override!r}: {'.'.join(done)} is {node!r}, which has no keys; set it as a whole"
            )
        done += parts[:taken]
        parts = parts[taken:]
        if not parts:
            node[here] = value
        elif isinstance(node, dict) and node.get(here) is None:
            node[here] = node = {}
        else:
            node = node[here]


def _index(part: str, entries: list[Any], override: str, where: str) -> int:
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    exist = f"entries 0 to {len(entries) - 1}" if entries else "no entries"
    raise ConfigError(
        f"override {override!r}: {where} has {exist}, not {part!r}; name one of them, or set {where} as a whole"
    )


def _resolve(node: DictConfig | ListConfig, where: str, problems: dict[str, str]) -> Any:
    """Plain data with every `${...}` replaced; what cannot be replaced is left out and listed by its path."""
    result: dict[str, Any] = {}
    keys: list[Any] = list(range(len(node))) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        path = f"{where}.{key}" if where else str(key)
        if OmegaConf.is_missing(node, key):
            problems[path] = f"{path}: ??? stands for a value that must be given; write it there, or add {path}=VALUE"
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            said = str(error).splitlines()[0]
            problems[path] = f"{path}: {said}; name an existing key, or ${{oc.env:VARIABLE}} for a variable that is set"
            continue
        result[str(key)] = _resolve(value, path, problems) if isinstance(value, DictConfig | ListConfig) else value
    return list(result.values()) if isinstance(node, ListConfig) else result


def _validate(data: dict[str, Any]) -> tuple[Config | None, dict[str, str]]:
    """The config, or dotted path -> sentence for all that the schema finds.

    The data goes through JSON because that is where pydantic's strict mode means what YAML means: a list may stand for
    a tuple, and an int for a float, but "3" is no number and true is no 1.
    """
    try:
        return Config.model_validate_json(json.dumps(data, default=str), strict=True), {}
    except ValidationError as error:
        found = explain(error, Config)
        if repaired := list(likely_kinds(error, Config)):
            for (*parents, last), kind in repaired:
                node: Any = data
                for key in parents:
                    node = node[key]
                node[last] = kind if isinstance(node[last], str) else node[last] | {KIND: kind}
            found |= _validate(data)[1]
        return None, found


def _within(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(f"{ancestor}.")


def _escape(value: Any) -> Any:
    """`${` that is part of a value, so that it is not looked up when the YAML is read."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value

"""The report: one HTML file with everything in it, which asks nothing of the network.

What a run holds is not to be trusted: prompts and responses are other people's text. It is in the page as JSON in which
no tag can end or begin, the script puts it there as text and never as HTML, and the page's content security policy lets
no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import time
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megatron_dgrpo import __version__, points
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.observe import environment, events
from megatron_dgrpo.observe.report import charts
from megatron_dgrpo.observe.report.history import read_history
from megatron_dgrpo.observe.report.overview import mixture, overview, phases
from megatron_dgrpo.observe.report.rollouts import NONE, Rollouts, shown

MAX_EVENTS = 1000


def write_report(run_dir: str | Path, out: str | Path | None = None, rollouts: Rollouts = NONE) -> Path:
    """The report of a run, in its folder or where it is asked for. Returns where it is."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder (looked from {Path.cwd()}): give the run_dir of a run")
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", events.FILE)):
        raise DataError(f"{folder} has neither config.yaml nor metrics.jsonl: give the run_dir of a run")
    target = Path(out) if out else folder / "report.html"
    text = page(gather(folder, rollouts))
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        points.write_file("report.new", aside, text.encode(), synced=False)
        points.rename("report.name", aside, target)
    except OSError as error:
        raise DataError(f"{target} can't be written ({error.strerror}): name another place with --out") from None
    return target


def gather(folder: Path, rollouts: Rollouts = NONE) -> dict[str, Any]:
    """All that the page shows."""
    notes: list[str] = []
    config = _yaml(folder / "config.yaml", notes)
    found_environment = _json(folder / environment.FILE)
    stages = [s for s in config.get("stages") or [] if isinstance(s, dict)]
    history = read_history(
        folder / "metrics.jsonl", [(str(s.get("kind", "?")), int(s.get("steps") or 0)) for s in stages]
    )
    found_events = events.read_events(folder / events.FILE)
    if found_events.damaged:
        notes.append(f"{found_events.damaged} lines of {events.FILE} are damaged and left out.")
    if len(found_events.records) > MAX_EVENTS:
        notes.append(f"The last {MAX_EVENTS} of {len(found_events.records):,} events are shown.")
    return {
        "title": folder.resolve().name,
        "made": time.time(),
        "version": __version__,
        **overview(folder, config, history, found_events.records, found_environment),
        "stages": [vars(stage) for stage in history.stages],
        "sections": charts.sections(history),
        "profiles": charts.profiles(history),
        "phases": phases(history),
        "mixture": mixture(history),
        "rollouts": shown(rollouts),
        "events": found_events.records[-MAX_EVENTS:],
        "notes": notes + history.notes,
        "config": _text(folder / "config.yaml"),
        "environment": found_environment,
    }


def page(data: dict[str, Any]) -> str:
    """The HTML of what was gathered."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:"
    return "\n".join([
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(str(data['title']))} · dgrpo report</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        '<main id="page"><noscript>This page draws its curves with JavaScript, which is turned off.</noscript></main>',
        f'<script type="application/json" id="data">{_embedded(data)}</script>',
        f"<script>{script}</script>",
        "</body>",
        "</html>",
        "",
    ])  # fmt: skip


def _asset(name: str) -> str:
    return resources.files("megatron_dgrpo.observe.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: dict[str, Any]) -> str:
    """JSON without a character that HTML gives a meaning; figures with as many digits as can be seen."""
    text = json.dumps(_rounded(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return None
        short = value if abs(value) > 1e8 else float(f"{value:.6g}")
        return int(short) if short.is_integer() and abs(short) < 2**53 else short
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path)
    if not text:
        notes.append("There is no config.yaml: models, stages and settings are not known.")
        return {}
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        notes.append("config.yaml is damaged.")
        return {}
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

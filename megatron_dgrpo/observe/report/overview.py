"""The head of the report: how the run ended, what it was, where it stands; where its time went; shares."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dgrpo.observe.pace import in_words
from megatron_dgrpo.observe.report.history import History

MAX_BARS = 100
_TILES = (
    ("held-out reward", "heldout/reward", ".3f"),
    ("reward", "reward/mean", ".3f"),
    ("KL to the teacher", "teacher_kl/kl", ".4f"),
    ("loss", "loss", ".4f"),
    ("entropy", "policy/entropy", ".3f"),
    ("mismatch", "mismatch/abs", ".1e"),
    ("response length", "response/length", ".1f"),
    ("tokens/s", "tokens_per_s", ",.0f"),
)


def overview(
    folder: Path,
    config: Mapping[str, Any],
    history: History,
    events: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    moments = [float(r["time"]) for r in [*history.records, *events] if isinstance(r.get("time"), int | float)]
    state, words = status(events, max(moments, default=None))
    facts: list[tuple[str, str]] = [("folder", str(folder.resolve()))]
    if moments:
        facts.append(("started", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(min(moments)))))
        facts.append(("took", in_words(max(moments) - min(moments))))
    facts += _models(config)
    if host := environment.get("host"):
        facts.append(("ran on", f"{host}, {environment.get('cores', '?')} cores"))
    versions = environment.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if command := environment.get("command"):
        facts.append(("command", " ".join(map(str, command))))
    return {
        "state": state,
        "state_words": words,
        "begun": min(moments, default=None),
        "facts": facts,
        "tiles": _tiles(history),
        "plan": _plan(config, history),
    }


def status(events: Sequence[Mapping[str, Any]], last: float | None) -> tuple[str, str]:
    """done, failed, interrupted or open; and what to say of it."""
    closing = {"end": "done", "failure": "failed", "interrupted": "interrupted"}
    final = next((e for e in reversed(events) if e.get("kind") in {"start", *closing}), None)
    if final is not None and final["kind"] in closing:
        words = str(final.get("words", ""))
        return closing[final["kind"]], "" if final["kind"] == "end" else words
    if last is None:
        return "open", "It has reported nothing so far."
    ago = in_words(max(0.0, time.time() - last))
    return "open", f"No end is recorded: it goes on, or was killed. Its last sign was {ago} before this page was made."


def _models(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    models = config.get("models")
    if not isinstance(models, dict):
        return []
    roles = [("student", config.get("student"))]
    roles += [("teacher", t.get("model")) for t in config.get("teachers") or [] if isinstance(t, dict)]
    facts = []
    for role, name in roles:
        if isinstance(model := models.get(name), dict):
            layout = model.get("layout") or {}
            cuts = [f"{axis} {size}" for axis, size in layout.items() if size not in (1, False)]
            facts.append((role, f"{model.get('path')}  ({model.get('dtype')}{', ' if cuts else ''}{', '.join(cuts)})"))
    if "seed" in config:
        facts.append(("seed", str(config["seed"])))
    return facts


def _tiles(history: History) -> list[dict[str, str]]:
    """The latest value of what matters most, and the first one of the same stage."""
    tiles = []
    for label, key, form in _TILES:
        found = [r for r in history.records if isinstance(r.get(key), int | float)]
        if not found:
            continue
        of_stage = [r for r in found if r["stage_number"] == found[-1]["stage_number"]]
        first, last = of_stage[0], of_stage[-1]
        tiles.append({
            "label": label,
            "value": format(float(last[key]), form),
            "before": f"{format(float(first[key]), form)} at step {first['step']}" if first is not last else "",
        })  # fmt: skip
    return tiles


def _plan(config: Mapping[str, Any], history: History) -> list[dict[str, str]]:
    """A line per stage: how far it is, and with which settings."""
    stages = [s for s in config.get("stages") or [] if isinstance(s, dict)]
    lines = []
    for stage in history.stages:
        settings = stages[stage.number] if stage.number < len(stages) else {}
        parts = []
        if "prompts_per_step" in settings:
            parts.append(f"{settings['prompts_per_step']} prompts x {settings.get('group_size', '?')} responses")
        if "batch_size" in settings:
            parts.append(f"{settings['batch_size']} examples")
        if isinstance(objective := settings.get("objective"), dict):
            parts.append(f"beta {_short(objective.get('beta'))}")
        if isinstance(sampling := settings.get("sampling"), dict):
            parts.append(f"temperature {sampling.get('temperature')}, at most {sampling.get('max_tokens')} tokens")
        if isinstance(optimizer := settings.get("optimizer"), dict):
            parts.append(f"lr {optimizer.get('lr')}")
        if isinstance(data := settings.get("data"), dict):
            sources = [s for s in data.get("mixture") or [data] if isinstance(s, dict)]
            parts.append(" + ".join(str(s.get("path") or s.get("hub")) for s in sources))
        lines.append({"name": f"{stage.number + 1}. {stage.kind}", "done": f"{stage.done} / {stage.steps}",
                      "settings": " · ".join(parts)})  # fmt: skip
    return lines


def _short(value: Any) -> str:
    """A factor: a number, or a schedule with where it starts."""
    if not isinstance(value, dict):
        return str(value)
    start = value.get("value", value.get("initial", value.get("start", "")))
    return str(start) if value.get("kind") == "constant" else f"{value.get('kind')} from {start}"


def phases(history: History) -> dict[str, Any]:
    """Seconds of each phase of a training step, in bars of neighbouring steps, and in all."""
    trained = [r for r in history.records if "time/step" in r and "heldout/reward" not in r]
    names: dict[str, None] = {}
    for r in trained:
        names.update(dict.fromkeys(k.removeprefix("time/") for k in r if k.startswith("time/") and k != "time/step"))
    size = max(1, -(-len(trained) // MAX_BARS))
    bars = []
    for i in range(0, len(trained), size):
        part = trained[i : i + size]
        seconds = [sum(_seconds(r, name) for r in part) / len(part) for name in names]
        whole = sum(_seconds(r, "step") for r in part) / len(part)
        bars.append({"from": part[0]["x"], "to": part[-1]["x"], "seconds": [*seconds, max(0.0, whole - sum(seconds))]})
    totals = {name: sum(_seconds(r, name) for r in trained) for name in names}
    totals["other"] = max(0.0, sum(_seconds(r, "step") for r in trained) - sum(totals.values()))
    evaluated = sum(_seconds(r, "step") for r in history.records if "heldout/reward" in r)
    return {"names": [*names, "other"], "bars": bars, "totals": list(totals.values()), "evaluation": evaluated}


def _seconds(record: Mapping[str, Any], name: str) -> float:
    value = record.get(f"time/{name}")
    return float(value) if isinstance(value, int | float) else 0.0


def mixture(history: History) -> dict[str, Any]:
    """Each source's share of a stage's tokens so far (`mixture/NAME`): in bars of steps, and at the end."""
    found = [r for r in history.records if any(k.startswith("mixture/") for k in r)]
    names: dict[str, None] = {}
    for r in found:
        names.update(dict.fromkeys(k.removeprefix("mixture/") for k in r if k.startswith("mixture/")))

    def parts(record: Mapping[str, Any]) -> list[float]:
        values = [record.get(f"mixture/{name}") for name in names]
        return [float(value) if isinstance(value, int | float) else 0.0 for value in values]

    size = max(1, -(-len(found) // MAX_BARS))
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    bars = [{"from": g[0]["x"], "to": g[-1]["x"], "parts": parts(g[-1])} for g in groups]
    last = {r["stage_number"]: r for r in found}
    totals = [
        [f"{number + 1}. {r.get('stage', '')}", name, part]
        for number, r in last.items()
        for name, part in zip(names, parts(r), strict=True)
        if f"mixture/{name}" in r
    ]
    return {"names": list(names), "bars": bars, "totals": totals}

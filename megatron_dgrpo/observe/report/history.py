"""The figures of a run as curves: metrics.jsonl, whatever state it is in, on one axis over all stages.

The axis counts steps: stage 1's step 3 comes after all steps of stage 0. Of several updates in a step each has its part
of the step before. Where a step was made again (a restart) the later record counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NOT_FIGURES = {"time", "stage", "stage_number", "step", "update"}
_NON_FINITE = {"NaN", "Infinity", "-Infinity"}
MAX_POINTS = 1000
"""Of a curve. A longer one keeps the least and the greatest value of each of half as many stretches."""


@dataclass
class Stage:
    number: int
    kind: str
    begins: int
    """Steps of the stages before it."""
    steps: int
    """That it was to have."""
    done: int = 0


@dataclass
class History:
    records: list[dict[str, Any]] = field(default_factory=list)
    """In order, each with its place on the axis under `x`."""
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not as it should be."""

    def keys(self) -> list[str]:
        """Names of all figures, in the order in which they come."""
        names: dict[str, None] = {}
        for record in self.records:
            names.update(dict.fromkeys(record))
        return [name for name in names if name not in _NOT_FIGURES and name != "x"]

    def curve(self, key: str) -> tuple[list[float], list[float | None]]:
        """Places and values; None where the value was not finite."""
        found = [(r["x"], _number(r[key])) for r in self.records if r.get(key) is not None]
        found = [point for point in found if point[1] is not _NO_NUMBER]
        return thinned([x for x, _ in found], [y for _, y in found])  # type: ignore[misc]


_NO_NUMBER = object()


def _number(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return float(value) if math.isfinite(value) else None
    return None if value in _NON_FINITE else _NO_NUMBER


def thinned(x: list[float], y: list[float | None]) -> tuple[list[float], list[float | None]]:
    """At most MAX_POINTS; the extremes of every stretch, its gaps and both ends stay."""
    if len(x) <= MAX_POINTS:
        return x, y
    stretches = MAX_POINTS // 2 - 2
    keep = {0, len(x) - 1}
    for i in range(stretches):
        places = range(i * len(x) // stretches, (i + 1) * len(x) // stretches)
        finite = [p for p in places if y[p] is not None]
        bad = next((p for p in places if y[p] is None), None)
        if bad is not None:
            keep.add(bad)
        if finite:
            keep |= {min(finite, key=lambda p: y[p] or 0.0)}
            if bad is None:
                keep.add(max(finite, key=lambda p: y[p] or 0.0))
    kept = sorted(keep)
    return [x[p] for p in kept], [y[p] for p in kept]


def read_history(path: Path, steps: Iterable[tuple[str, int]]) -> History:
    """`steps` are the kinds and steps of the config's stages; what the config does not tell is taken from the file."""
    history = History()
    lines = _lines(path, history.notes)
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    replaced = 0
    for record in lines:
        evaluated = "heldout/reward" in record
        place = (record["stage_number"], record["step"], evaluated, record.get("update", 0))
        if place in latest:
            replaced += 1
            del latest[place]
        latest[place] = record
    if replaced:
        history.notes.append(f"{replaced} records were made again (after a restart); the curves show the later ones.")
    records = sorted(latest.values(), key=lambda r: (r["stage_number"], r["step"], r.get("update", 0)))
    history.stages = _stages(records, list(steps))
    begins = {stage.number: stage.begins for stage in history.stages}
    updates: dict[tuple[int, int], int] = {}
    for r in records:
        at = (r["stage_number"], r["step"])
        updates[at] = max(updates.get(at, 1), int(r.get("update", 1)))
    for r in records:
        of = updates[r["stage_number"], r["step"]]
        r["x"] = begins[r["stage_number"]] + r["step"] - (of - int(r.get("update", of))) / of
    history.records = records
    return history


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Every record that can be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        notes.append("There is no metrics.jsonl: the run has not reported a step.")
        return []
    except OSError as error:
        notes.append(f"metrics.jsonl can't be read ({error.strerror}).")
        return []
    *whole, last = content.split(b"\n")
    records, damaged = [], 0
    for line in whole:
        try:
            record = json.loads(line.decode("utf-8"))
            usable = isinstance(record["stage_number"], int) and isinstance(record["step"], int)
        except (ValueError, KeyError, TypeError):
            usable = False
        if usable:
            records.append(record)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{damaged} lines of metrics.jsonl are damaged and left out.")
    if last:
        notes.append("The last line of metrics.jsonl is unfinished and left out: the run goes on, or was killed.")
    if not records:
        notes.append("metrics.jsonl has no record yet.")
    return records


def _stages(records: list[Mapping[str, Any]] | list[dict[str, Any]], steps: list[tuple[str, int]]) -> list[Stage]:
    kinds = {r["stage_number"]: str(r.get("stage", "?")) for r in records}
    done: dict[int, int] = {}
    for r in records:
        done[r["stage_number"]] = max(done.get(r["stage_number"], 0), r["step"])
    stages, begins = [], 0
    for number in range(max([len(steps), *(n + 1 for n in kinds)])):
        kind, planned = steps[number] if number < len(steps) else (kinds.get(number, "?"), done.get(number, 0))
        planned = max(planned, done.get(number, 0))
        stages.append(Stage(number, kind, begins, planned, done.get(number, 0)))
        begins += planned
    return stages

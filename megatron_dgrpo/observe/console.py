"""A run to look at: a line per step, coloured on a terminal and plain elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.text import Text

_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("loss", ("loss",), ".4f"),
    ("held-out reward", ("heldout/reward",), ".3f"),
    ("reward", ("reward/mean",), ".3f"),
    ("KL", ("teacher_kl/kl",), ".4f"),
    ("mismatch", ("mismatch/abs",), ".1e"),
    ("clipped", ("surrogate/clipped_low", "surrogate/clipped_high"), ".1%"),
    ("grad", ("grad_norm",), ".3g"),
    ("tokens/s", ("tokens_per_s",), ",.0f"),
)
"""What a line shows: its label, the metrics that are summed, their format. What a step does not have is left out."""


class Console:
    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self._rich = RichConsole(file=stream, highlight=False) if stream.isatty() else None
        self._stream = stream

    def step(self, stage: str, step: int, steps: int, values: Mapping[str, Any]) -> None:
        line = Text().append(f"{stage} {step:>{len(str(steps))}}/{steps}", style="bold cyan")
        for label, keys, form in _COLUMNS:
            if (cell := _cell(values, keys, form)) is not None:
                line.append(f"  {label} ", style="dim").append(
                    cell, style="bold red" if cell[-1] in "nf" else "default"
                )
        if equal := values.get("equal_groups"):
            style = "bold red" if equal == values["groups"] else "default"
            line.append("  equal groups ", style="dim").append(f"{equal:.0f}/{values['groups']:.0f}", style=style)
        times = {key.removeprefix("time/"): seconds for key, seconds in values.items() if key.startswith("time/")}
        shown = [f"{name} {seconds:.1f}s" for name, seconds in times.items() if name != "step" and seconds >= 0.05]
        if shown:
            line.append(f"  ({' '.join(shown)})", style="dim")
        self._print(line)

    def note(self, words: str) -> None:
        """Something else than a step."""
        self._print(Text(words))

    def _print(self, line: Text) -> None:
        if self._rich is not None:
            self._rich.print(line, soft_wrap=True)
        else:
            print(line.plain, file=self._stream, flush=True)


def _cell(values: Mapping[str, Any], keys: tuple[str, ...], form: str) -> str | None:
    found = [values[key] for key in keys if values.get(key) is not None]
    if not found:
        return None
    total = float(sum(found))
    return format(total, form) if math.isfinite(total) else str(total)  # nan, inf, -inf

"""A run to look at: a line per step, coloured on a terminal and plain elsewhere, its columns under one another."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.text import Text

from megatron_dgrpo.observe.pace import Pace, in_words


@dataclass(frozen=True)
class Column:
    """What a line shows: the metrics are summed. What a step does not have is left out."""

    label: str
    keys: tuple[str, ...]
    form: str
    width: int


COLUMNS = (
    Column("loss", ("loss",), ".4f", 7),
    Column("held-out reward", ("heldout/reward",), ".3f", 5),
    Column("reward", ("reward/mean",), ".3f", 5),
    Column("KL", ("teacher_kl/kl",), ".4f", 6),
    Column("mismatch", ("mismatch/abs",), ".1e", 7),
    Column("clipped", ("surrogate/clipped_low", "surrogate/clipped_high"), ".1%", 5),
    Column("grad", ("grad_norm",), ".3g", 7),
    Column("tokens/s", ("tokens_per_s",), ",.0f", 7),
)


class Console:
    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self._rich = RichConsole(file=stream, highlight=False) if stream.isatty() else None
        self._stream = stream
        self._pace = Pace()

    def step(self, stage: str, step: int, steps: int, values: Mapping[str, Any]) -> None:
        line = Text().append(f"{stage} {step:>{len(str(steps))}}/{steps}", style="bold cyan")
        for column in COLUMNS:
            if (found := cell(values, column)) is not None:
                style = "bold red" if found[-1] in "nf" else "default"
                line.append(f"  {column.label} ", style="dim").append(f"{found:>{column.width}}", style=style)
        if equal := values.get("equal_groups"):
            style = "bold red" if equal == values["groups"] else "default"
            line.append("  equal groups ", style="dim").append(f"{equal:.0f}/{values['groups']:.0f}", style=style)
        self._pace.observe(values)
        if (left_s := self._pace.left_s(steps)) and step < steps:
            line.append(f"  {in_words(left_s)} left", style="dim")
        times = {key.removeprefix("time/"): seconds for key, seconds in values.items() if key.startswith("time/")}
        shown = [f"{name} {seconds:.1f}s" for name, seconds in times.items() if name != "step" and seconds >= 0.05]
        if shown:
            line.append(f"  ({' '.join(shown)})", style="dim")
        self._print(line)

    def note(self, words: str) -> bool:
        """Something else than a step. Whether it could be shown."""
        return self._print(Text(words))

    def _print(self, line: Text) -> bool:
        """A stream that takes nothing (a log on a full disk, a terminal that has gone) ends nothing."""
        try:
            if self._rich is not None:
                self._rich.print(line, soft_wrap=True)
            else:
                print(line.plain, file=self._stream, flush=True)
        except OSError:
            return False
        return True


def cell(values: Mapping[str, Any], column: Column) -> str | None:
    found = [values[key] for key in column.keys if values.get(key) is not None]
    if not found:
        return None
    total = float(sum(map(float, found)))
    return format(total, column.form) if math.isfinite(total) else str(total)  # nan, inf, -inf

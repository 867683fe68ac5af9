"""What the one who has the terminal shows of a run: rank 0's lines, and under them where the run is.

Rank 0 writes to a log, its figures to metrics.jsonl and what is long to its board; the supervisor follows all three. On
a terminal the last lines are a footer that is drawn anew: the stage with its bar and what is left of it, the latest
figures, the phases' shares, and a bar for what is long. Elsewhere (a file, a pipe, a batch job's log) there are plain
lines alone; what takes longer than 10 seconds gets one every 10 seconds.

When the terminal, or whoever reads the pipe, has gone, nothing more is shown; the log has it all.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_dgrpo.observe.console import COLUMNS, cell
from megatron_dgrpo.observe.follow import Follower
from megatron_dgrpo.observe.pace import Pace, in_words
from megatron_dgrpo.observe.progress import State, read_board

_LINE_S = 10.0
"""Between two plain lines about something long."""
_STYLES = (
    (r"^(sft|kd|opd|grpo|dgrpo) +\d+/\d+", "bold cyan"),
    (r"\([^()]*\)$", "dim"),
    (r"(?i)^warning:.*", "yellow"),
    (r"(?i)^error:.*", "bold red"),
    (r"(?<= )(nan|-?inf)(?= |$)", "bold red"),
)


class Screen:
    """Call `tick` several times a second, and `close` at the end."""

    def __init__(
        self,
        run_dir: Path,
        log: Path | None,
        boards: Callable[[], list[Path]],
        *,
        hidden: Callable[[str], object] = lambda line: False,
        stream: TextIO | None = None,
    ) -> None:
        stream = stream or sys.stdout
        self._stream, self._boards, self._hidden = stream, boards, hidden
        self._log = Follower(log) if log else None
        self._metrics = Follower(run_dir / "metrics.jsonl")
        self._latest: dict[str, Any] = {}
        self._pace = Pace()
        self._gone = False
        self._told: tuple[str, float] = ("", -_LINE_S)
        self._notices: dict[Path, int] = {}
        rich = RichConsole(file=stream, highlight=False)
        self._rich = rich if stream.isatty() and not rich.is_dumb_terminal else None
        self._live: Live | None = None
        self._drawn_at = 0.0

    def tick(self) -> None:
        self._show(last=False)

    def say(self, words: str) -> None:
        """A line of the one who has the terminal."""
        self._guarded(lambda: self._print(words))

    def close(self) -> None:
        self._show(last=True)
        if self._live is not None:
            self._guarded(self._live.stop)
            self._live = None

    def _show(self, last: bool) -> None:
        for line in self._log.lines(last) if self._log else ():
            if not self._hidden(line):
                self._guarded(lambda line=line: self._print(line))  # type: ignore[misc]
        self._guarded(self._show_notices)
        if self._rich is not None:
            self._follow_metrics()
            if not last and time.monotonic() - self._drawn_at >= 0.2:
                self._drawn_at = time.monotonic()
                self._guarded(self._draw)
        else:
            self._guarded(self._tell)

    def _guarded(self, show: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            show()
        except OSError:
            self._gone = True
            self._live = None

    def _print(self, line: str) -> None:
        if self._rich is None:
            print(line, file=self._stream, flush=True)
            return
        text = Text(line)
        for pattern, style in _STYLES:
            text.highlight_regex(pattern, style)
        self._rich.print(text, soft_wrap=True)

    def _show_notices(self) -> None:
        """What a process could not say in its log."""
        for path in self._boards():
            state = read_board(path)
            if state is not None and state.notices > self._notices.get(path, 0):
                self._notices[path] = state.notices
                self._print(state.notice)

    def _state(self) -> State | None:
        """Of the process that began something last."""
        states = [state for path in self._boards() if (state := read_board(path)) is not None]
        return max(states, key=lambda state: (state.began, state.step), default=None)

    # ---- plain lines ----

    def _tell(self) -> None:
        """A line about what is long, now and then."""
        now = time.monotonic()
        if now - self._told[1] < _LINE_S / 20:
            return
        state = self._state()
        if state is None or not state.what:
            return
        name = f"{state.what}{state.began}"
        since = self._told[1] if self._told[0] == name else state.began
        if now - since >= _LINE_S:
            self._told = (name, now)
            self._print(_in_a_line(state, now))

    # ---- the footer ----

    def _follow_metrics(self) -> None:
        for line in self._metrics.lines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("stage_number") != self._latest.get("stage_number"):
                self._latest = {}
            if "time/step" in record:  # phases of one step, and not of an evaluation, whose figures stay
                evaluated = "heldout/reward" in record
                times = record if evaluated else self._latest
                for key in [key for key in times if key.startswith("time/")]:
                    del times[key]
            self._latest |= record
            self._pace.observe(record)

    def _draw(self) -> None:
        state = self._state()
        if state is None:
            return
        if self._live is None:
            self._live = Live(
                console=self._rich, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        self._live.update(self._footer(state), refresh=True)

    def _footer(self, state: State) -> Group:
        parts: list[Any] = []
        if state.stage:
            bars = Table.grid(padding=(0, 1))
            left_s = self._pace.left_s(state.steps)
            eta = f"{in_words(left_s)} left" if left_s is not None else ""
            done = max(0, state.step - 1)
            bars.add_row(
                Text(f"stage {state.stage_number + 1}: {state.stage} {state.step}/{state.steps}", "bold cyan"),
                ProgressBar(total=max(1, state.steps), completed=done, width=30),
                Text(eta, "dim"),
            )
            parts += [bars, *_figures(self._latest)]
        if state.what:
            bars = Table.grid(padding=(0, 1))
            known = state.total > 0
            bar = ProgressBar(total=state.total if known else None, completed=state.done, width=30, pulse=not known)
            bars.add_row(Text(state.what), bar, Text(_amount(state, time.monotonic()), "dim"))
            parts.append(bars)
        return Group(*parts)


def _figures(latest: Mapping[str, Any]) -> list[Text]:
    line = Text(overflow="fold")
    for column in COLUMNS:
        if (found := cell(latest, column)) is not None:
            line.append(f"{column.label} ", "dim").append(found).append("   ")
    times = {k.removeprefix("time/"): v for k, v in latest.items() if k.startswith("time/") and k != "time/step"}
    total = latest.get("time/step") or 0
    shares = Text(overflow="fold")
    if total and times:
        shares.append(f"{total:.1f} s a step: ", "dim")
        shares.append(
            "   ".join(f"{name} {share / total:.0%}" for name, share in times.items() if share / total >= 0.01)
        )
    return [text for text in (line, shares) if text.plain]


def _amount(state: State, now: float) -> str:
    """How much is done, and how long the rest takes at this pace."""
    if not state.total:
        return in_words(now - state.began)
    factor, unit = _scale(state)
    words = (
        f"{state.done / factor:,.4g}/{state.total / factor:,.4g} {unit}".strip() + f", {state.done / state.total:.0%}"
    )
    if 0 < state.done < state.total:
        words += f", {in_words((now - state.began) * (state.total - state.done) / state.done)} left"
    return words


def _scale(state: State) -> tuple[float, str]:
    if state.unit != "bytes":
        return 1.0, state.unit
    return next(
        ((2.0**n, unit) for n, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if state.total >= 2**n), (1.0, "B")
    )


def _in_a_line(state: State, now: float) -> str:
    where = f"{state.stage} {state.step}/{state.steps}  " if state.stage else ""
    return f"{where}{state.what}: {_amount(state, now)}"

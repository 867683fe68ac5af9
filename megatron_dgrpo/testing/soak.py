"""Runs that are killed again and again, at named points and at random moments, and have to end as if they had not been.

A `Chain` is one run folder in which runs are started until one gets to its end; each start is killed somewhere. What
the folder holds is compared after every start, and the ended run with one that was never broken off. Then the folder is
emptied and the next run begins.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgrpo.checkpoint.manifest import TRAINER, checkpoints
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.testing import faults
from megatron_dgrpo.testing.fault_cases import Case
from megatron_dgrpo.testing.faults import Fault, diverged, plan, reached, struck
from megatron_dgrpo.testing.preloaded import PreloadedRun

MakeConfig = Callable[[Path, Path], dict[str, Any]]
Compare = Callable[[Path, Path, bool], list[str]]
"""What is wrong with a run's folder beside that of an unbroken run; whether the run has ended."""
_RUN_S = 200.0
_TRIES = 3
VICTIMS = ("supervisor", "rank0", "rank1", "server", "engine-rollout")


def exact(run_dir: Path, other: Path, ended: bool) -> list[str]:
    """Of synchronous, deterministic runs: bit for bit."""
    return faults.different(run_dir, other) if ended else diverged(run_dir, other)


def each_once(run_dir: Path, other: Path, ended: bool) -> list[str]:
    """Of periodic runs: every trajectory once, of the right weights."""
    return faults.rollout_problems(run_dir, other, ended=ended) if (run_dir / "config.yaml").exists() else []


@dataclass(frozen=True)
class Start:
    """How a start went."""

    status: int
    struck: int
    """Faults that have struck; of a random kill, 1 if it came before the end."""
    ended: bool
    """Whether the run got to its end, and its folder was emptied."""
    seconds: float
    lost_updates: int
    """That were made, and are in no checkpoint."""
    problems: tuple[str, ...]


class Chain:
    def __init__(self, folder: Path, files: Path, make: MakeConfig, compare: Compare) -> None:
        self.folder, self._files, self._make, self._compare = folder, files, make, compare
        self.run_dir = folder / "run"
        self.unbroken = folder / "unbroken"
        self.reached: dict[str, Counter[str]] = {}
        """In the unbroken run."""
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> float:
        """The unbroken run, if it is not there; returns how long it takes."""
        figures = self.folder / "unbroken.json"
        if not figures.exists():
            shutil.rmtree(self.unbroken, ignore_errors=True)
            shutil.rmtree(self.folder / "plan", ignore_errors=True)
            start = time.monotonic()
            run = self._run(self.unbroken, (), plan(self.folder / "plan", record=True))
            assert run.wait(_RUN_S) == 0, run.words
            seconds = time.monotonic() - start
            write_json(figures, {"seconds": seconds, "reached": reached(self.folder / "plan")})
        found = json.loads(figures.read_text(encoding="utf-8"))
        self.reached = {role: Counter(counts) for role, counts in found["reached"].items()}
        return float(found["seconds"])

    def strike(self, case: Case) -> list[Start]:
        """Starts until the fault has struck: in the run as it stands if it still gets there, else in new ones."""
        starts: list[Start] = []
        for _ in range(_TRIES):
            if case.before:
                starts.append(self.start(case.before, case.overrides))
            if case.damaged and not self._damage():
                continue
            starts.append(self.start((*case.beside, case.fault), case.overrides))
            if starts[-1].struck == 1 + len(case.beside) or starts[-1].problems:
                break
        return starts

    def start(self, given: Sequence[Fault] = (), overrides: Sequence[str] = ()) -> Start:
        """With a plan of faults; without any, the run ends."""
        folder = self.folder / "plan"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        run = self._run(self.run_dir, overrides, plan(folder, *given))
        status = run.wait(_RUN_S)
        return self._judge(run, status, struck(folder), time.monotonic() - began)

    def seconds_left(self, whole: float) -> float:
        """About how long the run takes from where it stands: half of a short run is its start."""
        try:
            done = len(faults.figures(self.run_dir)) / len(faults.figures(self.unbroken))
        except DataError:
            done = 0.0
        return whole * (1.0 - 0.5 * min(1.0, done))

    def kill_at(self, after_s: float, victim: str) -> Start:
        """Kill a process of the run so long after its start; the supervisor, and with it all, if it is not there."""
        began = time.monotonic()
        run = self._run(self.run_dir, (), {})
        while not run.ended and time.monotonic() - began < after_s:
            time.sleep(0.002)
        came = run.supervisor.returncode is None
        if came:
            _kill(run, victim)
        return self._judge(run, run.wait(_RUN_S), int(came), time.monotonic() - began)

    def _run(self, run_dir: Path, overrides: Sequence[str], env: dict[str, str]) -> PreloadedRun:
        config = faults.write_config(self.folder / "config.yaml", self._make(self._files, run_dir))
        return PreloadedRun(config, *overrides, env=env)

    def _judge(self, run: PreloadedRun, status: int, num_struck: int, seconds: float) -> Start:
        problems: list[str] = []
        lost = _lost_updates(self.run_dir)
        if status not in ((0, 1, -signal.SIGKILL) if num_struck else (0,)):
            problems.append(f"it ended with status {status}: {run.words}")
        ended = status == 0
        try:
            problems += self._compare(self.run_dir, self.unbroken, ended)
        except Exception as error:  # whatever it is that cannot be read
            problems.append(f"{type(error).__name__}: {error}")
        if problems:
            kept = self.folder / f"wrong-{len(list(self.folder.glob('wrong-*')))}"
            shutil.move(self.run_dir, kept)
            problems = [f"see {kept}", *problems]
        elif ended:
            shutil.rmtree(self.run_dir)
        return Start(status, num_struck, ended, seconds, 0 if ended else lost, tuple(problems))

    def _damage(self) -> bool:
        """Change a byte of the newest checkpoint, where there is an older one."""
        found = checkpoints(self.run_dir)
        if len(found) < 2:
            return False
        (weights, *_) = sorted((found[0] / "weights").glob("*.distcp"))
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        return True


def _kill(run: PreloadedRun, victim: str) -> None:
    if victim == "server":
        run.servers["trainer"].kill()
        return
    for pid in _below(run.servers["trainer"].pid) | _below(run.servers["engine"].pid):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == victim:
                os.kill(pid, signal.SIGKILL)
                return
        except OSError:
            continue
    run.supervisor.kill()


def _below(pid: int) -> set[int]:
    pending, found = [pid], set[int]()
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            try:
                new = {int(child) for child in task.read_text().split()}
            except OSError:  # it has ended
                continue
            pending += new
            found |= new
    return found


def _lost_updates(run_dir: Path) -> int:
    """Updates in the figures that the newest checkpoint has not."""
    try:
        newest = next(iter(checkpoints(run_dir)), None)
        trainer = json.loads((newest / TRAINER).read_text(encoding="utf-8")) if newest else {"version": 0}
        made = sum("loss" in record for record in faults.figures(run_dir))
        return max(0, made - int(trainer["version"]))
    except Exception:  # nothing is there yet, or it is damaged
        return 0


def random_moment(seed: int, number: int, seconds: float) -> tuple[float, str]:
    """When the kill of a number comes, and whom it meets."""
    draw = random.Random(f"{seed}/{number}")
    return draw.uniform(0.0, seconds), draw.choice(VICTIMS)


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)

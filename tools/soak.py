"""Kill tiny runs at every named point and at random moments, resume each, and compare: is anything lost or different?

    .venv/bin/python tools/soak.py [--folder DIR] [--random 100] [--periodic-random 25] [--seed 0] [--quick]

Runs are real: two ranks, an engine, a teacher, a checkpoint after each step. With the synchronous schedule the figures
and weights have to be those of an unbroken run, bit for bit; with the periodic one every trajectory is trained on once,
of the right weights. Processes are forked from servers that have imported everything. What was done stands in
FOLDER/state.json: the same command goes on where it was interrupted. Prints a table and a line of JSON; exit status 1
when anything differs. `--quick` takes a few points and a few moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dgrpo.testing.distributed import session_nursery
from megatron_dgrpo.testing.fault_cases import cases
from megatron_dgrpo.testing.faults import tiny_periodic_run, tiny_run
from megatron_dgrpo.testing.one_hop_models import write_models
from megatron_dgrpo.testing.soak import Chain, Start, each_once, exact, random_moment, write_json

OF_PERIODIC = ("step.", "journal.", "metrics.", "save.", "folder.name", "transfer.", "engine.", "announce")
"""Points at which the schedule makes a difference."""
QUICK = ("folder.name", "transfer.box", "step.update", "checkpoint.manifest", "journal.record")
_ROW = "{:24} {:>6} {:>8} {:>10} {:>12} {:>12} {:>11}"


def main() -> int:
    options = _parse()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder / "state.json", options.seed)
    for kind in ("trainer", "engine"):
        session_nursery(kind)  # type: ignore[arg-type] # both import at the same time
    if not (folder / "files" / "task").exists():
        write_models(folder / "files", 0, num_train=128, num_heldout=16)
    schedules = {
        "synchronous": (Chain(folder / "synchronous", folder / "files", tiny_run, exact), options.random),
        "periodic": (
            Chain(folder / "periodic", folder / "files", tiny_periodic_run, each_once),
            options.periodic_random,
        ),
    }
    for schedule, (chain, num_random) in schedules.items():
        if not options.quick or schedule == "synchronous":
            _soak(state, schedule, chain, num_random, options)
    return state.report(options.quick)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="of the runs, and of the state")
    parser.add_argument("--random", type=int, default=100, metavar="N", help="random kills, synchronous (%(default)s)")
    parser.add_argument("--periodic-random", type=int, default=25, metavar="N", help="and periodic (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--quick", action="store_true", help="a few points and moments: under two minutes")
    options = parser.parse_args()
    if options.quick:
        options.random = min(options.random, 3)
    return options


def _soak(state: State, schedule: str, chain: Chain, num_random: int, options: argparse.Namespace) -> None:
    seconds = chain.begin()
    for case in cases(chain.reached, options.seed):
        point = case.fault.point
        wanted = point in QUICK if options.quick else schedule == "synchronous" or point.startswith(OF_PERIODIC)
        if wanted and not state.has(schedule, case.name):
            state.add(schedule, case.name, chain.strike(case))
    for number in range(num_random):
        name = f"random {number}"
        if not state.has(schedule, name):
            starts: list[Start] = []
            while not starts or not (starts[-1].struck or starts[-1].problems):  # until it comes before the end
                after_s, victim = random_moment(options.seed, number + 1000 * len(starts), chain.seconds_left(seconds))
                starts.append(chain.kill_at(after_s, victim))
            state.add(schedule, name, starts)
    if not state.has(schedule, "to the end"):
        state.add(schedule, "to the end", [chain.start()])


class State:
    """What was done so far, in a file that is whole at any time."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._began = time.monotonic()
        self._content: dict[str, Any] = {"seed": seed, "done": {}, "seconds": 0.0}
        if path.exists():
            self._content = json.loads(path.read_text(encoding="utf-8"))
            if self._content["seed"] != seed:
                sys.exit(f"{path} is of seed {self._content['seed']}: give that one, or another folder")
            print(f"goes on after {sum(map(len, self._content['done'].values()))} kills in {path}")

    def has(self, schedule: str, name: str) -> bool:
        return name in self._content["done"].get(schedule, {})

    def add(self, schedule: str, name: str, starts: list[Start]) -> None:
        done = self._content["done"].setdefault(schedule, {})
        done[name] = [vars(start) for start in starts]
        now = time.monotonic()
        self._content["seconds"] += now - self._began
        self._began = now
        write_json(self._path, self._content)
        words = "struck" if starts[-1].struck else "ended" if starts[-1].ended else "never struck"
        print(f"{len(done):4} {schedule:12} {name:40} {words:12} {sum(s.seconds for s in starts):6.1f} s", flush=True)
        for start in starts:
            for problem in start.problems[:20]:
                print(f"     {problem}", flush=True)

    def report(self, quick: bool) -> int:
        print(_ROW.format("", "kills", "starts", "whole runs", "lost updates", "mismatches", "not reached"))
        total = {"kills": 0, "starts": 0, "whole_runs": 0, "mismatches": 0, "not_reached": 0}
        lost: list[int] = []
        for schedule, done in self._content["done"].items():
            for what in ("random", "points"):
                found = {n: s for n, s in done.items() if n.startswith("random ") == (what == "random")}
                starts = [start for each in found.values() for start in each]
                killed = [start for start in starts if start["struck"]]
                its_lost = [start["lost_updates"] for start in killed if not start["ended"]]
                figures = {
                    "kills": len(killed),
                    "starts": len(starts),
                    "whole_runs": sum(start["ended"] for start in starts),
                    "mismatches": sum(bool(start["problems"]) for start in starts),
                    "not_reached": sum(n != "to the end" and not each[-1]["struck"] for n, each in found.items()),
                }
                mean = statistics.fmean(its_lost) if its_lost else 0.0
                row = [figures["kills"], figures["starts"], figures["whole_runs"], f"{mean:.2f}"]
                print(_ROW.format(f"{schedule}, {what}", *row, figures["mismatches"], figures["not_reached"]))
                lost += its_lost
                total = {name: total[name] + figures[name] for name in total}
        wrong = total["mismatches"] + (0 if quick else total["not_reached"])
        mean = statistics.fmean(lost) if lost else 0.0
        line = {"name": "soak", "quick": quick} | total | {"mean_lost_updates": mean, "ok": not wrong}
        print(json.dumps(line | {"seconds": round(self._content["seconds"])}))
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

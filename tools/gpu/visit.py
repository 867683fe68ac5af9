#!/usr/bin/env python
"""All that a GPU must show, in one command: every file of tests/gpu and every benchmark in its CUDA form.

    tools/gpu/visit.py --out FOLDER [--wheels build/gpu] [--limit-s 540] [--quick] [--only NAME ...]
                       [--again]

Each step has a process and a time limit of its own, and what fails stops nothing. FOLDER gets the steps' output, JUnit
files of the tests and JSON lines of the benchmarks. Steps that are done are remembered in build/gpu-visit.json: a call
that runs out of its limit ends with status 3, and the next one goes on where it stopped. At the end a table of all
steps is printed; status 0: all passed or were skipped, 1: something failed.

With --wheels, what `tools/gpu/wheels.py pack` made is installed first, where that has not been done, and used.
Without a GPU the tests skip and the benchmarks take their form for the CPU: a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
_STATE, VENV = ROOT / "build" / "gpu-visit.json", ROOT / "build" / "gpu-venv"
SECONDS = {"test": 300, "bench": 420}
ON_GPU = {"heads": ["--device", "cuda"], "tree": ["--cuda"], "conversion": [], "balance": [], "checkpoint": []}
ON_CPU_ALONE = {"observe", "rollout", "schedule", "step", "weight_transfer"}
"""Benchmarks with no form for a GPU: they compare with a floor on the CPU, and all but the first need vLLM."""
NOTHING_COLLECTED = 5


def steps(python: str, out: Path, quick: bool, gpu: bool) -> dict[str, tuple[str, list[str]]]:
    """Name -> (kind, command)."""
    found: dict[str, tuple[str, list[str]]] = {}
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        report = ["--junitxml", str(out / f"{path.stem}.xml")]
        found[path.stem] = "test", [python, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider", *report]
    for path in sorted((ROOT / "tools" / "bench").glob("[a-z]*.py")):
        if path.stem in ON_CPU_ALONE:
            continue
        assert path.stem in ON_GPU, f"say in ON_GPU how {path.name} runs on a GPU"
        options = (ON_GPU[path.stem] if gpu else []) + (["--quick"] if quick else [])
        found[path.stem] = "bench", [python, str(path), *options]
    return found


def run(name: str, kind: str, command: list[str], out: Path, seconds: float) -> dict[str, object]:
    log, start = out / f"{name}.{'jsonl' if kind == 'bench' else 'log'}", time.monotonic()
    with log.open("wb") as file, (out / f"{name}.err").open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=file, stderr=errors, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, 9)
            process.wait()
    result = {None: f"no end within {seconds:.0f} s", 0: "ok"}.get(status, f"failed with status {status}")
    if kind == "test" and status in (0, NOTHING_COLLECTED):
        result = _counted(out / f"{name}.xml")
    return {"result": result, "seconds": round(time.monotonic() - start, 1), "log": log.name}


def _counted(report: Path) -> str:
    """Passed and skipped, and why."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    skipped = suite.findall(".//skipped")
    total, words = int(suite.get("tests", 0)), f"ok: {int(suite.get('tests', 0)) - len(skipped)} passed"
    reasons = sorted({_reason(entry.text or entry.get("message") or "") for entry in skipped})
    return f"{words}, {len(skipped)} of {total} skipped ({'; '.join(reasons)})" if skipped else words


def _reason(text: str) -> str:
    """Without the place in the file."""
    return re.sub(r"^.*(?:Skipped: |\.py:\d+: )", "", text, flags=re.DOTALL).strip("')")


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests and benchmarks of a GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, help="parts from `wheels.py pack`, installed first")
    parser.add_argument("--limit-s", type=float, default=540, help="of this call")
    parser.add_argument("--quick", action="store_true", help="the small form of every benchmark")
    parser.add_argument("--state", type=Path, default=_STATE, help="where to remember what is done")
    parser.add_argument("--only", nargs="+", help="names of steps")
    parser.add_argument("--again", action="store_true", help="forget what is done")
    given = parser.parse_args()
    end, out = time.monotonic() + given.limit_s, given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    if given.wheels:
        if not (VENV / "done").exists():
            tool = [python, str(ROOT / "tools" / "gpu" / "wheels.py"), "install", str(given.wheels)]
            if subprocess.run([*tool, "--venv", str(VENV)]).returncode:
                return 1
            (VENV / "done").touch()
        python = str(VENV / "bin" / "python")
    look = "import torch, sys; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    device = subprocess.run([python, "-c", look], capture_output=True, text=True).stdout.strip()
    print(f"device: {device or 'none, a rehearsal on the CPU'}", flush=True)
    todo = steps(python, out, given.quick, bool(device))
    todo = {name: step for name, step in todo.items() if not given.only or name in given.only}
    state: Path = given.state
    state.parent.mkdir(exist_ok=True)
    done = json.loads(state.read_text()) if state.exists() and not given.again else {}
    for name, (kind, command) in todo.items():
        left = end - time.monotonic()
        if name in done:
            continue
        if left < min(SECONDS[kind], given.limit_s / 2):
            break
        print(f"{name} ...", flush=True)
        done[name] = run(name, kind, command, out, min(SECONDS[kind], left))
        state.write_text(json.dumps(done, indent=1))
        (out / "summary.json").write_text(json.dumps({"device": device, "steps": done}, indent=1))
    for name in todo:
        print(f"{name:24} {done[name]['result'] if name in done else 'still to run: call again'}")
    if any(name not in done for name in todo):
        return 3
    return 0 if all(str(done[name]["result"]).startswith("ok") for name in todo) else 1


if __name__ == "__main__":
    sys.exit(main())

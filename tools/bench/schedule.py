"""The periodic schedule against the synchronous one, on responses of uneven lengths. One JSON line per case; status 1
when a target is missed.

    python tools/bench/schedule.py [--quick] [--folder FOLDER]

One run of `dgrpo train`, whose stages take turns between the two schedules: the engine is pinned to one core and a
trainer of one rank to another, in all of them. The models are untrained and the learning rate is 0, so that every step
draws from the same distribution of lengths: about geometric, cut at `max_tokens`. The first stage warms both sides up.

`ratio` is the synchronous schedule's time over the periodic one's, the median of the pairs of turns (`ratios`), and
`overall` that of all turns' sums. `generate_s` and `train_s` are the parts of the synchronous time; `waited_s` is what
the periodic schedule's trainer waited for groups; `bound` is what the ratio would be if the lesser part were hidden
behind the other altogether. `versions` are the greatest number of weight versions in any step, by the journal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.rollout.journal import read_step, steps

TARGET = 1.1
MAX_TOKENS = 448


def make_models(folder: Path) -> None:
    """In a process of its own: it imports torch."""
    from megatron_dgrpo.testing.one_hop import write_one_hop
    from megatron_dgrpo.testing.tiny import save_tiny_qwen3, save_tokenizer

    files = write_one_hop(folder / "task", num_train=1024, num_heldout=1)
    words = [str(word) for word in range(files.vocab_size - 3)]
    for seed, (name, hidden, layers) in enumerate((("student", 128, 2), ("teacher", 256, 6))):
        save_tiny_qwen3(
            folder / name,
            vocab_size=files.vocab_size,
            hidden=hidden,
            layers=layers,
            heads=hidden // 32,
            kv_heads=hidden // 64,
            std=0.02,
            seed=seed,
            special_ids=files.special_ids,
        )
        save_tokenizer(folder / name, words)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes((folder / "task" / file).read_bytes())


def config(folder: Path, rounds: int, num_steps: int, prompts: int) -> dict[str, Any]:
    model = {"dtype": "float32"}
    stage = {
        "kind": "dgrpo",
        "data": {"path": str(folder / "task/train.jsonl")},
        "engine": "rollout",
        "steps": num_steps,
        "prompts_per_step": prompts,
        "group_size": 4,
        "sampling": {"max_tokens": MAX_TOKENS},
        "rewards": [{"kind": "exact_match"}],
        "optimizer": {"lr": 0.0},
        "preflight": False,
        "diagnostics_every": 0,
        "micro_batch_tokens": 4096,
    }
    periodic = {"kind": "periodic", "chunk_groups": max(1, prompts // 8)}
    turns = [stage | {"schedule": periodic if is_periodic(i) else "synchronous"} for i in range(2 * rounds)]
    return {
        "run_dir": str(folder / "run"),
        "models": {name: model | {"path": str(folder / name)} for name in ("student", "teacher")},
        "student": "student",
        "teachers": [{"model": "teacher"}],
        "engines": {"rollout": {"model": "student", "max_model_len": 512, "kv_cache_bytes": 2**28}},
        "stages": [stage | {"steps": 1}, *turns],
    }


def is_periodic(turn: int) -> bool:
    """Turns are synchronous, periodic, periodic, synchronous, ...: what else the machine does weighs on both alike."""
    return turn % 4 in (1, 2)


class Pinning(threading.Thread):
    """Puts every thread of the engine on one core and of the trainer on another, as they come."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        first, second = sorted(os.sched_getaffinity(0))[:2]
        self._core = {"engine-rollout": first, "rank0": second}
        self.pinned: dict[str, set[int]] = {name: set() for name in self._core}

    def run(self) -> None:
        family = {os.getpid()}
        while not self.done.wait(0.2):
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    pid, _, rest = stat.read_text().partition(" (")
                    name, _, fields = rest.rpartition(") ")
                    if int(fields.split()[1]) not in family:
                        continue
                    family.add(int(pid))
                    if name in self._core:
                        for thread in (stat.parent / "task").iterdir():
                            os.sched_setaffinity(int(thread.name), {self._core[name]})
                        self.pinned[name].add(int(pid))
                except OSError:  # it has ended
                    continue


def versions_per_step(run_dir: Path) -> int:
    """And every step's is the one that its engine was given."""
    most = 0
    for stage, step in steps(run_dir / "rollouts"):
        found = read_step(run_dir / "rollouts", stage, step)
        assert found.generated and found.finished and not found.untrained
        arrays = [s.weight_versions for t in found.trajectories for s in t.segments if s.weight_versions is not None]
        versions = {int(v) for versions_T in arrays for v in versions_T}
        assert found.began.version in versions
        most = max(most, len(versions))
    return most


def measure(folder: Path, rounds: int, num_steps: int, prompts: int) -> bool:
    subprocess.run([sys.executable, __file__, "--make", str(folder)], check=True, capture_output=True)
    path = folder / "config.yaml"
    path.write_text(json.dumps(config(folder, rounds, num_steps, prompts)), encoding="utf-8")
    pinning = Pinning(folder / "run")
    pinning.start()
    train(load(path))
    pinning.done.set()
    assert all(len(pids) == 1 for pids in pinning.pinned.values()), "engine and trainer were not found"
    total: dict[str, float] = {}
    lengths: list[float] = []
    seconds = [0.0] * (2 * rounds)
    for record in read_metrics(folder / "run/metrics.jsonl").records:
        if record["stage_number"] == 0:
            continue
        kind = "periodic" if is_periodic(record["stage_number"] - 1) else "synchronous"
        for name in ("step", "generate", "score", "pack", "teach", "train", "sync"):
            total[f"{kind}/{name}"] = total.get(f"{kind}/{name}", 0.0) + record.get(f"time/{name}", 0.0)
        lengths.append(record["response/length"])
        seconds[record["stage_number"] - 1] += record["time/step"]
    parts = {
        "generate_s": total["synchronous/generate"] + total["synchronous/score"],
        "train_s": sum(total[f"synchronous/{name}"] for name in ("pack", "teach", "train")),
    }
    pairs = [seconds[i : i + 2][:: -1 if is_periodic(i) else 1] for i in range(0, 2 * rounds, 2)]
    ratios = [synchronous / periodic for synchronous, periodic in pairs]
    ratio = median(ratios)
    ok = ratio >= TARGET
    row = {
        "name": f"{prompts} prompts x 4 responses, {rounds * num_steps} steps of each schedule",
        "mean_length": sum(lengths) / len(lengths),
        "max_tokens": MAX_TOKENS,
        "synchronous_s": total["synchronous/step"],
        "periodic_s": total["periodic/step"],
        **parts,
        "waited_s": total["periodic/generate"],
        "bound": total["synchronous/step"] / (total["synchronous/step"] - min(parts.values())),
        "ratios": [float(f"{one:.3g}") for one in ratios],
        "versions": versions_per_step(folder / "run"),
        "overall": total["synchronous/step"] / total["periodic/step"],
        "ratio": ratio,
        "target": TARGET,
        "ok": ok,
    }
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps")
    parser.add_argument("--folder", type=Path, help="keep the run in this folder, which must not exist")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_models(arguments.make)
        return 0
    rounds, num_steps, prompts = (2, 1, 16) if arguments.quick else (7, 1, 16)
    if arguments.folder:
        arguments.folder.mkdir(parents=True)
        return int(not measure(arguments.folder, rounds, num_steps, prompts))
    with tempfile.TemporaryDirectory(prefix="dgrpo-schedule-") as folder:
        return int(not measure(Path(folder), rounds, num_steps, prompts))


if __name__ == "__main__":
    sys.exit(main())

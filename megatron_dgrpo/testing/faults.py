"""Faults at named points and at any moment, in whole tiny runs; and what has to be the same afterwards.

A plan (points/plan.py) says where a process of a run is killed, stopped, slowed down, finds the disk full, or damages
what it has just written. The runs are real: ranks, an engine, weight transfers, checkpoints at every step.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.schema import OnPolicy
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.points.plan import VARIABLE, Fault
from megatron_dgrpo.rollout.journal import StepRollouts, read_step, steps
from megatron_dgrpo.rollout.messages import sample_seed

WALL_CLOCK = ("time", "tokens_per_s")


def plan(folder: Path, *faults: Fault, record: bool = False) -> dict[str, str]:
    """Write a plan; returns the environment that has a run follow it. Processes that are started again do, too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    marked = [asdict(fault) | {"mark": str(folder / f"struck-{number}")} for number, fault in enumerate(faults)]
    path.write_text(json.dumps({"record": str(folder) if record else None, "faults": marked}), encoding="utf-8")
    return {VARIABLE: str(path)}


def struck(folder: Path) -> int:
    """How many faults of a plan have struck."""
    return len(list(folder.glob("struck-*")))


def reached(folder: Path) -> dict[str, Counter[str]]:
    """With `record`: how often each point was reached, by role. Of processes with one role, those of one add up."""
    found: dict[str, Counter[str]] = {}
    for path in folder.glob("*.points"):
        role = path.name.rpartition("-")[0]
        found.setdefault(role, Counter()).update(path.read_text().split())
    return found


def tiny_run(files: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A config whose runs end in seconds: SFT, then dGRPO with two updates to a batch, at TP2, with held-out rewards
    and an adaptive beta. `files` has the one-hop task with its models (testing/one_hop_models.py)."""
    data, rewards = {"path": str(files / "task/train.jsonl")}, [{"kind": "exact_match"}]
    model = {"dtype": "float32", "layout": {"tp": 2}}
    engine = {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**24, "bucket_bytes": 2**16}
    return {
        "run_dir": str(run_dir),
        "models": {name: model | {"path": str(files / name)} for name in ("student", "teacher")},
        "student": "student",
        "teachers": [{"model": "teacher"}],
        "engines": {"rollout": engine | {"checksums": True}},
        "rollout": {"deterministic": True},
        "trackers": [{"kind": "tensorboard"}],
        "keep_rollouts": 2,
        "evaluation": {
            "data": {"path": str(files / "task/heldout.jsonl")},
            "engine": "rollout",
            "num_prompts": 4,
            "sampling": {"max_tokens": 2},
            "rewards": rewards,
            "every": 2,
        },
        "checkpoints": {"every": 1, "keep_last": 2},
        "stages": [
            {"kind": "sft", "data": data, "steps": 2, "batch_size": 4, "optimizer": {"lr": 1e-2, "warmup_steps": 3}},
            {
                "kind": "dgrpo",
                "data": data,
                "engine": "rollout",
                "prompts_per_step": 2,
                "group_size": 2,
                "steps": 3,
                "updates_per_batch": 2,
                "rewards": rewards,
                "sampling": {"max_tokens": 3, "temperature": 0.7},
                "objective": {"beta": {"kind": "adaptive", "initial": 0.5, "target": 1e-3}},
                "optimizer": {"lr": 1e-3, "warmup_steps": 5},
            },
        ],
    } | changes  # fmt: skip


def tiny_periodic_run(files: Path, run_dir: Path) -> dict[str, Any]:
    """The same with a stage of the periodic schedule at the end, a group at a time. All rollouts are kept."""
    config = tiny_run(files, run_dir)
    sft, dgrpo = config["stages"]
    one = dgrpo | {"updates_per_batch": 1, "prompts_per_step": 4}
    periodic = one | {"schedule": {"kind": "periodic", "chunk_groups": 1, "groups_in_memory": 1}}
    stages = [sft | {"steps": 1}, one | {"steps": 1}, periodic | {"steps": 4}]
    return config | {"stages": stages, "keep_rollouts": None, "evaluation": None}


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Every record of a run, but for what the clock says."""
    return [
        {key: value for key, value in record.items() if key not in WALL_CLOCK and not key.startswith("time/")}
        for record in read_metrics(run_dir / "metrics.jsonl").records
    ]


def diverged(run_dir: Path, other: Path) -> list[str]:
    """What the figures of a run that may not have ended have otherwise than those of one that has."""
    if not (run_dir / "metrics.jsonl").exists():
        return []
    problems, theirs = [], figures(other)
    for number, one in enumerate(figures(run_dir)):
        two = theirs[number] if number < len(theirs) else {}
        names = sorted(key for key in one | two if one.get(key) != two.get(key))
        where = ", ".join(f"{key} {two.get(key)}" for key in ("stage_number", "step", "update"))
        problems += [f"{where}: {name} is {one.get(name)!r}, not {two.get(name)!r}" for name in names]
    return problems


def different(run_dir: Path, other: Path) -> list[str]:
    """What is not the same, bit for bit, of two runs that ended: figures of each step, weights at the end."""
    problems = diverged(run_dir, other)
    ours, theirs = len(figures(run_dir)), len(figures(other))
    if ours != theirs:
        problems.append(f"it has {ours} records, not {theirs}")
    mine, his = (load_file(folder / "hf/model.safetensors") for folder in (run_dir, other))
    names = [name for name in his if name not in mine or not (mine[name] == his[name]).all()]
    problems += [f"{path.name} is left over" for path in (run_dir / "checkpoints").glob(".*")]
    return problems + [f"{name}: the weights differ" for name in names]


def rollout_problems(run_dir: Path, other: Path | None = None, *, ended: bool = True) -> list[str]:
    """Whether a run has lost a trajectory or trained on one twice, and whether versions of weights are right, by its
    journal and its figures. It keeps all rollouts. `other` is a run that was not broken off: prompts are the same."""
    config = load(run_dir / "config.yaml")
    journal, problems = run_dir / "rollouts", list[str]()
    lines = [
        (r["stage_number"], r["step"], r.get("update", 0)) for r in read_metrics(run_dir / "metrics.jsonl").records
    ]
    updates = Counter(line for line in lines if line[2])
    problems += [f"step {line}: {count} records of one update" for line, count in updates.items() if count > 1]
    version = 0
    for number, stage in enumerate(config.stages):
        if not isinstance(stage, OnPolicy):
            version += stage.steps
            continue
        for step in range(1, stage.steps + 1):
            where = f"stage {number}, step {step}"
            if (number, step) in steps(journal):
                found = read_step(journal, number, step)
                trained = bool(found.trained)
                if ended or trained:
                    wrong = _step_problems(found, version, stage.group_size, config.seed + number, whole=ended)
                    problems += [f"{where}: {words}" for words in wrong]
                if other is not None and (other_ids := read_step(other / "rollouts", number, step).began.prompt_ids):
                    problems += [f"{where}: other prompts"] * (found.began.prompt_ids != other_ids)
            elif ended:
                problems.append(f"{where}: it has no rollouts")
            if ended and not all((number, step, u) in updates for u in range(1, stage.updates_per_step + 1)):
                problems.append(f"{where}: it has not the figures of all its updates")
            version += stage.updates_per_step
    return problems


def _step_problems(found: StepRollouts, version: int, group_size: int, seed: int, *, whole: bool) -> list[str]:
    began, problems = found.began, list[str]()
    trained = [sample for update in found.trained for sample in update.samples]
    asked = [(name, number) for name in began.prompt_ids for number in range(group_size)]
    if whole and not (found.generated and found.finished and not found.undone and not found.torn_bytes):
        problems.append("it is not whole")
    if whole and sorted(trained) != sorted(asked):
        problems.append(f"trained {len(trained)} samples, {len(set(trained))} of them different, of {len(asked)}")
    if len(trained) != len(set(trained)):
        problems.append("samples were trained on twice")
    if began.version != version:
        problems.append(f"it began with version {began.version} of the weights, not {version}")
    if [update.version for update in found.trained] != [version + 1 + i for i in range(len(found.trained))]:
        problems.append(f"its updates made the versions {[update.version for update in found.trained]}")
    for trajectory in found.trajectories:
        versions = {int(v) for s in trajectory.segments if s.weight_versions is not None for v in s.weight_versions}
        if versions != {version}:
            problems.append(f"{trajectory.prompt_id}: sampled from the versions {sorted(versions)}")
    problems += [
        f"{name}: another seed"
        for (name, sample), its in found.seeds.items()
        if its != sample_seed(seed, began.step, name, sample)
    ]
    return problems

"""`dgrpo demo`: a retrieval task, a teacher, a student, dGRPO with a real engine; held-out reward before and after.

Everything is made on the spot and runs through `dgrpo train`'s own code: the configs that it writes can be run again by
hand. This process imports no torch; the models are made by another one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import ConfigError, LaunchError
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics

TENSOR_PARALLEL = 2


def run_demo(out: Path, seed: int) -> int:
    start = time.monotonic()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already: remove it, or name another folder with --out")
    make_files(out, seed)
    _say(f"[1/4] teacher: SFT until it answers nearly every question ({out}/teacher.yaml)")
    run_config(write_config(out, "teacher", teacher_config(out, seed)))
    taught = heldout(out / "runs/teacher")[-1]
    _say(f"[2/4] student: a short SFT, so that it answers some ({out}/student.yaml)")
    run_config(write_config(out, "student", student_config(out, seed)))
    _say(f"[3/4] dGRPO at tp={TENSOR_PARALLEL} with a vLLM engine and that teacher ({out}/dgrpo.yaml)")
    run_config(write_config(out, "dgrpo", dgrpo_config(out, seed)))
    before, *_, after = heldout(out / "runs/dgrpo")
    _say("[4/4] the exported folder in a fresh vLLM engine")
    run_config(write_config(out, "check", check_config(out, seed)))
    again = heldout(out / "runs/check")[-1]
    _say(f"teacher's held-out reward            {taught:.3f}")
    _say(f"student's held-out reward   before   {before:.3f}   (512 prompts, one sampled answer each)")
    _say(f"                            after    {after:.3f}   {after - before:+.3f}")
    _say(f"the exported folder in a new engine  {again:.3f}   {out / 'runs/dgrpo/hf'}")
    _say(f"{time.monotonic() - start:.0f} s in all")
    return 0


def _say(words: str) -> None:
    print(words, flush=True)


def make_files(out: Path, seed: int) -> None:
    """The task and both models, made by a process that may import torch."""
    made = subprocess.run([sys.executable, "-m", "megatron_dgrpo.testing.one_hop_models", str(out), str(seed)])
    if made.returncode:
        raise LaunchError(f"the demo's files could not be made in {out}: see the messages above")


def write_config(out: Path, name: str, config: dict[str, Any]) -> Path:
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | {"run_dir": str(out / "runs" / name)}, sort_keys=False), encoding="utf-8")
    return path


def run_config(path: Path) -> None:
    train(load(path))


def heldout(run_dir: Path) -> list[float]:
    """The held-out rewards of a run, in order."""
    return read_metrics(run_dir / "metrics.jsonl").series("heldout/reward")


def teacher_config(out: Path, seed: int) -> dict[str, Any]:
    stage = {"kind": "sft", "steps": 140, "batch_size": 64, "optimizer": {"lr": 2e-3, "warmup_steps": 20}}
    return _config(out, seed, "teacher", {"teacher": _model(out / "teacher", 1)}, stage)


def student_config(out: Path, seed: int) -> dict[str, Any]:
    stage = {"kind": "sft", "steps": 105, "batch_size": 64, "optimizer": {"lr": 1e-3, "warmup_steps": 20}}
    return _config(out, seed, "student", {"student": _model(out / "student", 1)}, stage)


def dgrpo_config(
    out: Path,
    seed: int,
    lr: float = 2e-3,
    steps: int = 30,
    *,
    beta: float = 0.5,
    reward_weight: float = 1.0,
    teacher: str = "teacher",
) -> dict[str, Any]:
    """Beta 0 is GRPO and has no teacher, reward weight 0 is OPD; `teacher` names the run whose weights teach."""
    models = {"student": _model(out / "runs/student/hf", TENSOR_PARALLEL)}
    if beta:
        models["teacher"] = _model(out / f"runs/{teacher}/hf", TENSOR_PARALLEL)
    stage = {
        "kind": "dgrpo",
        "engine": "rollout",
        "steps": steps,
        "prompts_per_step": 64,
        "group_size": 8,
        "sampling": {"max_tokens": 4},
        "rewards": [{"kind": "exact_match", "weight": reward_weight}],
        "objective": {"beta": beta},
        "optimizer": {"lr": lr, "warmup_steps": 5},
        "diagnostics_every": 10,
    }
    return _config(out, seed, "student", models, stage) | {"teachers": [{"model": "teacher"}] if beta else []}


def check_config(out: Path, seed: int) -> dict[str, Any]:
    """No training: the evaluation alone."""
    stage = {"kind": "sft", "steps": 0, "batch_size": 1, "optimizer": {"lr": 0.0}}
    return _config(out, seed, "student", {"student": _model(out / "runs/dgrpo/hf", 1)}, stage)


def _model(path: Path, tp: int) -> dict[str, Any]:
    return {"path": str(path), "dtype": "float32", "layout": {"tp": tp, "sequence_parallel": tp > 1}}


def _config(out: Path, seed: int, student: str, models: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": seed,
        "models": models,
        "student": student,
        "engines": {"rollout": {"model": student, "max_model_len": 32, "kv_cache_bytes": 2**26}},
        "evaluation": {
            "data": {"path": str(out / "task/heldout.jsonl")},
            "engine": "rollout",
            "num_prompts": 512,
            "sampling": {"max_tokens": 4},
            "rewards": [{"kind": "exact_match"}],
            "every": 10 if stage["kind"] == "dgrpo" else 0,
        },
        "stages": [stage | {"data": {"path": str(out / "task/train.jsonl")}}],
    }

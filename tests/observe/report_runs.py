"""Run folders to make reports of: written by the code that writes them in a run, with figures that are made up."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import yaml

from megatron_dgrpo.observe.environment import write_environment
from megatron_dgrpo.observe.events import EventLog
from megatron_dgrpo.observe.metrics import MetricsWriter
from megatron_dgrpo.observe.report.rollouts import Rollout

POSITIONS = (0, 1024, 4096, 16384, 32768, 65536, 131072)
BY_POSITION = ("row/kl", "row/entropy", "row/teacher_mass", "mismatch/abs", "surrogate/ratio", "surrogate/clipped_low",
               "surrogate/clipped_high", "tokens")  # fmt: skip
NASTY = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'> <!-- & \u2028 \x00 \ud800"


def write_run(folder: Path, *, sft_steps: int = 200, dgrpo_steps: int = 800, end: str = "end") -> Path:
    """Two stages, with all kinds of figures that a run has."""
    folder.mkdir(parents=True)
    stages: list[dict[str, Any]] = [
        {"kind": "sft", "steps": sft_steps, "batch_size": 64, "optimizer": {"lr": 1e-4}, "data": {"path": "sft.jsonl"}},
        {"kind": "dgrpo", "steps": dgrpo_steps, "prompts_per_step": 32, "group_size": 8, "optimizer": {"lr": 1e-6},
         "objective": {"beta": {"kind": "constant", "value": 0.5}},
         "sampling": {"max_tokens": 4096, "temperature": 1.0}},
    ]  # fmt: skip
    models = {"student": {"path": "models/1.7B", "dtype": "bfloat16", "layout": {"tp": 2, "pp": 1}}}
    config = {"run_dir": str(folder), "models": models, "student": "student", "stages": stages, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_environment(folder)
    log, writer, draw = EventLog(folder), MetricsWriter(folder / "metrics.jsonl"), random.Random(0)
    log.write("start", "started")
    for step in range(1, sft_steps + 1):
        writer.write({"time": 1e9 + 8 * step, "stage": "sft", "stage_number": 0, "step": step, "grad_norm": 2.0,
                      "loss": 3 * math.exp(-step / 60) + draw.gauss(0.4, 0.05), "lr": 1e-4, "mixture/short": 0.1,
                      "mixture/long": 0.9, "time/pack": 0.2, "time/train": 7.0, "time/step": 7.5})  # fmt: skip
    for step in range(1, dgrpo_steps + 1):
        writer.write(_dgrpo(step, draw) | {"time": 1e9 + 8 * sft_steps + 20 * step})
        if step % 50 == 0:
            writer.write({"time": 1e9 + 8 * sft_steps + 20 * step, "stage": "dgrpo", "stage_number": 1, "step": step,
                          "heldout/reward": 0.3 + 0.5 * step / dgrpo_steps, "heldout/length": 900.0,
                          "time/generate": 30.0, "time/step": 31.0})  # fmt: skip
    log.write("drop", f"2 sequences are too long: {NASTY}", level="warning", stage="dgrpo", stage_number=1, step=3)
    log.write(end, "ended well" if end == "end" else "rank1 was killed", level="info" if end == "end" else "error")
    return folder


def _dgrpo(step: int, draw: random.Random) -> dict[str, Any]:
    done = 1 - math.exp(-step / 250)

    def about(value: float) -> float:
        return value * draw.gauss(1, 0.05)

    values: dict[str, Any] = {
        "stage": "dgrpo", "stage_number": 1, "step": step, "update": 1, "reward/mean": about(0.3 + 0.5 * done),
        "reward/std": 0.4, "response/length": about(300 + 900 * done), "response/truncated": about(0.02),
        "groups": 32.0, "equal_groups": 3.0, "tokens": 3e6, "loss": about(1.0), "grad_norm": about(3.0), "lr": 1e-6,
        "teacher_kl/kl": about(1.8 - 1.6 * done), "teacher_kl/loss": about(1.0), "teacher_kl/factor": 0.5,
        "surrogate/loss": draw.gauss(0, 0.01), "surrogate/ratio": about(1.0), "surrogate/ratio_max": about(3.0),
        "surrogate/clipped_low": about(0.01), "surrogate/clipped_high": about(0.02), "surrogate/factor": 1.0,
        "policy/entropy": about(1.0), "mismatch/abs": about(1e-3), "mismatch/max": about(0.4),
        "disagree/surrogate.teacher_kl": about(0.3), "time/sync": 0.5, "time/generate": about(10.0), "time/score": 0.2,
        "time/teach": 3.0, "time/train": about(6.0), "time/step": 21.0, "tokens_per_s": 1.5e5,
    }  # fmt: skip
    for position in POSITIONS:
        values |= {f"{name}@{position}": about(0.1 + position / 2e5) for name in BY_POSITION}
    if step % 10 == 1:
        values |= {"gradient/surrogate/norm": about(0.01), "gradient/teacher_kl/norm": about(0.02),
                   "gradient/surrogate.teacher_kl/cosine": about(0.4)}  # fmt: skip
    return values


def rollouts(count: int = 800) -> list[Rollout]:
    return [
        Rollout(1, step, f"prompt {step} {NASTY}\n" + "a long document " * 2000, f"response {step} {NASTY}",
                {"exact_match": float(step % 2), "length": 0.25}, "stop" if step % 5 else "length", step, f"r:{step}")
        for step in range(1, count + 1)
    ]  # fmt: skip

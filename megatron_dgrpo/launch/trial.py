"""`dgrpo generate` and `dgrpo eval`: a model, or what a run has exported, in engines of their own. Imports no torch.

Both run the evaluation section of a config without a trainer. For a run it is the run's own config; for a model's
folder it is made here, and `key=value` arguments fill in what is to be otherwise. One process beside the engines
encodes prompts, asks and scores.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dgrpo.config.checks import check_files
from megatron_dgrpo.config.loader import assemble, dump, read_raw
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.preflight import check_models
from megatron_dgrpo.launch.run import engine_hosts, start_engine
from megatron_dgrpo.launch.supervisor import Supervisor

STUDENT, ENGINE = "student", "rollout"
_ROOM = 4096
"""Tokens for prompts where nothing is said of the engine's lengths."""
_MAX_TOKENS = 1024


def generate(
    folder: Path,
    overrides: Sequence[str],
    *,
    data: str | None,
    samples: int,
    prompts: int | None,
    out: Path,
    token_ids: bool,
    logprobs: bool,
) -> int:
    # A config's evaluation has rewards. None is computed here, so that the one that stands for them needs no answer.
    config = trial_config(folder, overrides, data=data, rewards=[{"kind": "json_valid"}])
    arguments = {"scored": False, "token_ids": token_ids, "logprobs": logprobs}
    found = _run(config, samples=samples, prompts=prompts, out=out, **arguments)
    print(f"{found['responses']} responses to {found['prompts']} prompts: {out}")
    return 0


def evaluate(
    folder: Path,
    overrides: Sequence[str],
    *,
    data: str | None,
    samples: int,
    prompts: int | None,
    figures: Path | None,
    responses: Path | None,
) -> int:
    config = trial_config(folder, overrides, data=data, rewards=None)
    found = _run(config, samples=samples, prompts=prompts, out=responses, scored=True, token_ids=False, logprobs=False)
    if figures is not None:
        _writable(figures)
        figures.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(found)))
    return 0


def trial_config(
    folder: Path, overrides: Sequence[str], *, data: str | None, rewards: list[dict[str, Any]] | None
) -> Config:
    """A config whose evaluation is what is asked for. It has a stage, as every config has, and the stage no step."""
    of_run = (folder / "config.yaml").is_file()
    raw = _of_run(folder) if of_run else _of_model(folder)
    evaluation = raw["evaluation"]
    if data is not None:
        kept = {} if of_run else evaluation.get("data", {})
        evaluation["data"] = {**kept, "path": data}
    if rewards is not None:
        evaluation["rewards"] = rewards
    config = assemble(raw, overrides, what=str(folder))
    assert config.evaluation is not None
    if config.engines[config.evaluation.engine].addresses:
        raise ConfigError(
            f"engines.{config.evaluation.engine}.addresses: what weights engines elsewhere have is not known; leave it "
            "out, and the command starts its own"
        )
    return config


def _of_model(folder: Path) -> dict[str, Any]:
    return {
        "models": {STUDENT: {"path": str(folder)}},
        "engines": {ENGINE: {"model": STUDENT, "max_model_len": _ROOM + _MAX_TOKENS, "kv_cache_bytes": 2**30}},
        **_common(STUDENT, {"engine": ENGINE, "sampling": {"max_tokens": _MAX_TOKENS}}),
    }


def _of_run(folder: Path) -> dict[str, Any]:
    """What is evaluated in the run, and its model as it was exported: config.json has the rotary embeddings by then."""
    raw = read_raw(folder / "config.yaml")
    exported = folder / "hf"
    if not exported.is_dir():
        raise ConfigError(f"{folder} is a run that has exported no model yet ({exported} is missing): wait for its end")
    student = raw["student"]
    model = {"path": str(exported), "dtype": raw["models"][student]["dtype"]}
    sampled = next((stage for stage in raw["stages"] if "engine" in stage), None)
    evaluation = raw.get("evaluation")
    if evaluation is None and sampled is not None:
        evaluation = {key: sampled[key] for key in ("engine", "sampling", "rewards", "data")}
    evaluation = evaluation or {"engine": ENGINE, "sampling": {"max_tokens": _MAX_TOKENS}}
    engines = raw.get("engines") or {}
    name = evaluation["engine"]
    engine = engines.get(name, {"model": student, "max_model_len": _ROOM + _MAX_TOKENS})
    engine = {key: value for key, value in engine.items() if key not in ("addresses", "key_file")}
    return {
        "models": {student: model},
        "engines": {name: engine},
        "rollout": raw.get("rollout") or {},
        "reward_workers": raw.get("reward_workers", 2),
        **_common(student, {**evaluation, "every": 0}),
    }


def _common(student: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_dir": "never-made",
        "student": student,
        "evaluation": {"num_prompts": 1, **evaluation},  # how many there are is known when they are read
        "stages": [
            {"kind": "sft", "data": {"path": "never-read"}, "steps": 0, "batch_size": 1, "optimizer": {"lr": 0.0}}
        ],
    }


def _run(config: Config, *, samples: int, prompts: int | None, out: Path | None, **what: bool) -> dict[str, Any]:
    """Start the engine and the process beside it; what it found."""
    assert config.evaluation is not None
    if samples < 1 or (prompts is not None and prompts < 1):
        raise ConfigError("--samples and --prompts: give 1 or more")
    if out is not None:
        _writable(out)
    reading = config.model_copy(
        update={"stages": (config.stages[0].model_copy(update={"data": config.evaluation.data}),)}
    )
    check_files(reading)
    check_models(config)
    scratch = Path(tempfile.mkdtemp(prefix="dgrpo-trial-"))
    name = config.evaluation.engine
    try:
        path, answer = scratch / "config.yaml", scratch / "answer.json"
        path.write_text(dump(config), encoding="utf-8")
        with Supervisor(scratch) as supervisor:
            supervisor.prepare("engine", "trainer")
            hosts = engine_hosts(supervisor, config, name)
            supervisor.start_ranks(
                "megatron_dgrpo.train.trial:main",
                {
                    "config_path": str(path),
                    "answer_path": str(answer),
                    "engines": {name: [f"unix:{socket}" for _, socket in hosts]},
                    "key": supervisor.key,
                    "control": supervisor.listen(),
                    "samples": samples,
                    "prompts": prompts,
                    "out": None if out is None else str(out.absolute()),
                    **what,
                },
                world_size=1,
                threads=config.threads_per_rank,
            )
            for host, socket in hosts:
                start_engine(supervisor, config, name, host, socket)
            supervisor.watch()
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if found["problem"]:
        raise ConfigError(found["problem"])
    return found


def _writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error}): name another file") from None


def table(found: dict[str, Any]) -> list[str]:
    rows = [("reward", "weight", f"avg@{found['samples']}", "standard error", f"best of {found['samples']}")]
    for name, one in found["rewards"].items():
        rows.append((name, f"{one['weight']:g}", f"{one['mean']:.4f}", f"{one['error']:.4f}", f"{one['best']:.4f}"))
    one = found["total"]
    rows.append(("total", "", f"{one['mean']:.4f}", f"{one['error']:.4f}", f"{one['best']:.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5))]) for row in rows]
    words = f"{found['prompts']} prompts, {found['samples']} responses each, {found['length']:.1f} tokens on average, "
    words += f"{found['truncated']:.1%} cut at the limit"
    if found["left_out"]:
        words += f"; {found['left_out']} prompts are left out, since a reward failed on them"
    return [*lines, words]

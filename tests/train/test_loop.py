"""The whole loop, for real: ranks, a vLLM engine, a teacher, weight transfer; and how it ends when a part is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import ConfigError, RolloutError
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.launch.supervisor import Supervisor
from megatron_dgrpo.observe.events import read_events
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.rollout.journal import read_step
from megatron_dgrpo.testing.tiny import save_tiny

TEMPERATURE = 0.7


def _config(files: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """SFT for two steps, dGRPO for three at T = 0.7 with two updates per batch, one at T = 1; TP2 with SP."""
    data = {"path": str(files / "task/train.jsonl")}
    layout = {"tp": 2, "sequence_parallel": True}
    rewards = [{"kind": "exact_match"}, {"kind": "token_f1", "weight": 0.5}]
    dgrpo = {
        "kind": "dgrpo",
        "data": data,
        "engine": "rollout",
        "prompts_per_step": 4,
        "group_size": 4,
        "rewards": rewards,
        "optimizer": {"lr": 1e-3},
    }
    config = {
        "run_dir": str(run_dir),
        "models": {
            name: {"path": str(files / name), "dtype": "float32", "layout": layout} for name in ("student", "teacher")
        },
        "student": "student",
        "teachers": [{"model": "teacher"}],
        "engines": {
            "rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26, "bucket_bytes": 2**16}
        },
        "evaluation": {
            "data": {"path": str(files / "task/heldout.jsonl")},
            "engine": "rollout",
            "num_prompts": 16,
            "sampling": {"max_tokens": 4},
            "rewards": rewards,
        },
        "stages": [
            {"kind": "sft", "data": data, "steps": 2, "batch_size": 8, "optimizer": {"lr": 1e-2}},
            dgrpo
            | {
                "steps": 3,
                "updates_per_batch": 2,
                "sampling": {"max_tokens": 4, "temperature": TEMPERATURE},
                "objective": {"beta": {"kind": "adaptive", "initial": 0.5, "target": 1e-3}},
                "diagnostics_every": 2,
            },
            dgrpo | {"steps": 1, "sampling": {"max_tokens": 4}},
        ],
    }
    return config | changes


def _write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_from_its_start_to_an_exported_folder(files: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(load(_write(tmp_path, _config(files, run_dir)))) == 0
    records = read_metrics(run_dir / "metrics.jsonl").records
    updates = [r for r in records if r["stage"] == "dgrpo" and "update" in r]
    assert [(r["step"], r["update"]) for r in updates] == [(s, u) for s in (1, 2, 3) for u in (1, 2)] + [(1, 1)]
    for record in updates:
        # the log-probs of the engine and the trainer are those of the same weights: every transfer arrived
        assert record["mismatch/max"] <= 1e-4 and record["teacher_kl/kl"] > 0.01
        assert record["nonfinite_rows"] == 0
        assert record["surrogate/ratio"] == pytest.approx(1.0, abs=1e-6 if record["update"] == 1 else 0.5)
    assert any(abs(r["surrogate/ratio_max"] - 1) > 1e-6 for r in updates if r["update"] == 2)
    # beta grows by 2 % a step, the most it may, as the KL is far above its target; then the last stage's constant
    assert [r["teacher_kl/factor"] for r in updates] == pytest.approx([0.5, 0.5, 0.51, 0.51, 0.5202, 0.5202, 0.5])
    assert [r["step"] for r in updates if "gradient/teacher_kl/norm" in r] == [1, 1, 3, 3, 1]
    assert [r["step"] for r in updates if r.get("preflight/identical_kl", 1) <= 1e-6] == [1, 1, 1]
    evaluations = [r for r in records if "heldout/reward" in r]
    assert [r["step"] for r in evaluations] == [0, 2, 0, 3, 0, 1]
    for record, total in [(r, "reward/mean") for r in updates] + [(r, "heldout/reward") for r in evaluations]:
        one, two = (record[f"{total.split('/')[0]}/score/{name}"] for name in ("exact_match", "token_f1"))
        assert record[total] == pytest.approx(one + 0.5 * two) and 0 <= one <= two <= 1
    kept = {"config.yaml", "environment.json", "events.jsonl", "metrics.jsonl", "logs", "hf"}
    assert kept <= {path.name for path in run_dir.iterdir()}
    last = [r for r in updates if "time/step" in r]
    assert [r["step"] for r in last] == [1, 2, 3, 1] and all(r["time/train"] > 0 for r in last)
    found = [event["kind"] for event in read_events(run_dir / "events.jsonl").records]
    kinds = ["checkpoint"] * 3 + ["end"] + ["memory"] * 3 + ["note", "start"]
    assert sorted(found) == kinds, "each stage's end; its dry batch; where it was exported"
    _loads_in_transformers_and_differs(run_dir / "hf", files / "student")
    assert not list(Path("/dev/shm").glob("dgrpo-*"))


def test_a_pipeline_taught_from_other_ranks_with_rotary_embeddings_of_the_configs_choice(
    files: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = _config(files, run_dir)
    student = {"layout": {"pp": 2}, "rope": {"kind": "yarn", "factor": 4, "original_max_positions": 8}}
    config["models"]["student"] |= student
    config["models"]["teacher"]["layout"] = {"dp": 1}
    config["teachers"] = [{"model": "teacher", "ranks": "own", "rows_in": "host"}]
    assert train(load(_write(tmp_path, config))) == 0
    updates = [r for r in read_metrics(run_dir / "metrics.jsonl").records if "update" in r and r["stage"] == "dgrpo"]
    assert len(updates) == 7
    for record in updates:  # engine and trainer turn by the same angles, and hold the same weights
        assert record["mismatch/max"] <= 1e-4 and record["teacher_kl/kl"] > 0.01


def test_each_row_is_taught_by_the_teacher_that_it_names(files: Path, tmp_path: Path) -> None:
    """One on the student's ranks, one of another family and size on a rank of its own."""
    vocab_size = json.loads((files / "teacher/config.json").read_text())["vocab_size"]
    other = save_tiny(tmp_path / "other", "Llama", tied=False, vocab_size=vocab_size, hidden=48, heads=3, seed=9)
    for tokenizer in (files / "teacher").glob("tokenizer*"):
        shutil.copy(tokenizer, other)
    rows = [json.loads(line) for line in (files / "task/train.jsonl").read_text().splitlines()[:64]]
    named = [json.dumps(row | {"scored_by": ("teacher", "other")[i % 2]}) for i, row in enumerate(rows)]
    (tmp_path / "named.jsonl").write_text("\n".join(named) + "\n")
    config = _config(files, tmp_path / "run")
    config["models"]["other"] = {"path": str(other), "dtype": "float32"}
    config["teachers"] = [{"model": "teacher", "rows_in": "host"}, {"model": "other", "ranks": "own"}]
    data = {"path": str(tmp_path / "named.jsonl"), "teacher": "scored_by"}
    config["stages"] = [stage | {"data": data, "steps": 2} for stage in config["stages"][2:]]
    assert train(load(_write(tmp_path, config))) == 0
    updates = [r for r in read_metrics(tmp_path / "run/metrics.jsonl").records if "update" in r]
    assert len(updates) == 2
    assert all(record["mismatch/max"] <= 1e-4 and record["nonfinite_rows"] == 0 for record in updates)
    taught = {name: [r[f"kl/{name}"] for r in updates if f"kl/{name}" in r] for name in ("teacher", "other")}
    assert all(kls and min(kls) > 0.01 for kls in taught.values()), taught
    for record in updates:  # the mean over all tokens lies between those of each teacher's own
        own = [record[f"kl/{name}"] for name in taught if f"kl/{name}" in record]
        assert min(own) - 1e-6 <= record["teacher_kl/kl"] <= max(own) + 1e-6


def _loads_in_transformers_and_differs(exported: Path, source: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(exported)
    before, after = load_file(source / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert (model.model.norm.weight == after["model.norm.weight"]).all()
    assert AutoTokenizer.from_pretrained(exported).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()


def test_what_is_wrong_is_said_before_anything_starts(files: Path, tmp_path: Path) -> None:
    config = _config(files, tmp_path / "run")
    config["models"]["teacher"] = {"path": str(files / "task"), "dtype": "float32", "layout": {"vpp": 2}}
    config["models"]["student"]["layout"] = {"tp": 3, "sequence_parallel": True}
    with pytest.raises(ConfigError, match=r"(?s)models.teacher.layout.vpp: 2.*config.json does not exist"):
        train(load(_write(tmp_path, config)))
    config["models"]["teacher"]["path"] = str(files / "teacher")
    config["models"]["teacher"]["layout"] = {"tp": 3}
    with pytest.raises(ConfigError, match=r"(?s)tp=3 does not divide the 2 .*heads.*tp=3 does not divide the 4"):
        train(load(_write(tmp_path, config)))
    assert not (tmp_path / "run").exists()


def test_bad_data_is_an_error_of_the_config_and_starts_no_rank(files: Path, tmp_path: Path) -> None:
    config = _config(files, tmp_path / "run")
    rows = (files / "task/train.jsonl").read_text().splitlines()[:3]
    (tmp_path / "bad.jsonl").write_text("\n".join([*rows, '{"prompt": "k1v2 k1"}', rows[0].replace("k", "q")]) + "\n")
    config["stages"][1]["data"] = {"path": str(tmp_path / "bad.jsonl")}
    config["evaluation"]["num_prompts"] = 10_000
    with pytest.raises(ConfigError, match=r"(?s)line 4.*answer.*evaluation.num_prompts"):
        train(load(_write(tmp_path, config)))
    assert not {"engine-rollout.log", "rank1.log"} & {path.name for path in (tmp_path / "run/logs").iterdir()}


def late_worker(**settings: Any) -> None:
    """A trainer whose second rank takes its time to end."""
    from megatron_dgrpo.train.worker import main

    main(**settings)
    if os.environ["RANK"] == "1":
        time.sleep(4)
        Path(settings["config_path"]).with_name("late").touch()


def test_a_rank_that_ends_late_does_not_make_a_failure_of_a_good_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine host ends with rank 0, while another rank may take its time."""
    config = _config(files, tmp_path / "run")
    config |= {"stages": config["stages"][:1], "teachers": []}
    start_ranks = Supervisor.start_ranks

    def start_late(supervisor: Supervisor, target: str, *args: Any, **kwargs: Any) -> None:
        assert target == "megatron_dgrpo.train.worker:main"
        start_ranks(supervisor, "test_loop:late_worker", *args, **kwargs)

    monkeypatch.setattr(Supervisor, "start_ranks", start_late)
    assert train(load(_write(tmp_path, config))) == 0
    assert (tmp_path / "run/late").exists()


# ---- ends that nobody wanted ----


def _descendants(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, last = {pid}, set()
    while found != last:
        last = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def _alive(pids: set[int]) -> set[int]:
    alive = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                alive.add(pid)
        except OSError:
            pass
    return alive


def _wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def _some_groups(run_dir: Path, step: int) -> int:
    """Wait until the first stage's step has a group in the journal; how many there are."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        with contextlib.suppress(RolloutError):  # it is not there, or is being begun
            if groups := read_step(run_dir / "rollouts", 0, step).groups:
                return len(groups)
        time.sleep(0.002)
    raise AssertionError(f"no group of step {step}")


@pytest.fixture
def running(files: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`dgrpo train` in the middle of its dGRPO stage."""
    config = _config(files, tmp_path / "run")
    config["stages"][1]["steps"] = 100_000
    config["engines"]["rollout"]["max_restarts"] = 0
    command = [sys.executable, "-m", "megatron_dgrpo.cli", "train", str(_write(tmp_path, config))]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background ignores Ctrl-C for all of them
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "run/metrics.jsonl"
    second_step = '"stage": "dgrpo", "stage_number": 1, "step": 2'
    try:
        _wait(
            lambda: process.poll() is not None or (metrics.exists() and second_step in metrics.read_text()),
            120,
            "the run did not get to its second dGRPO step",
        )
        assert process.poll() is None, process.stderr.read()
        yield process, tmp_path / "run"
    finally:
        process.kill()
        process.wait()


def _named(pids: set[int], name: str) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == name]


def test_ctrl_c_leaves_no_process(running: tuple[subprocess.Popen[str], Path]) -> None:
    process, run_dir = running
    family = _descendants(process.pid)
    assert len(family) == 8, "supervisor, two servers, two ranks, one engine host, two reward workers"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    _wait(lambda: not _alive(family), 60, "processes are left after Ctrl-C")
    assert "interrupted" in process.stderr.read()
    kinds = [event["kind"] for event in read_events(run_dir / "events.jsonl").records]
    assert kinds[0] == "start" and kinds[-3:] == ["checkpoint", "end early", "interrupted"]


def test_sigkill_of_the_supervisor_leaves_no_process(running: tuple[subprocess.Popen[str], Path]) -> None:
    process, _ = running
    family = _descendants(process.pid)
    process.kill()
    _wait(lambda: not _alive(family), 60, "processes are left after the supervisor's death")
    assert not list(Path("/dev/shm").glob("dgrpo-*"))


def test_a_killed_engine_ends_the_run_with_its_name(running: tuple[subprocess.Popen[str], Path]) -> None:
    process, _ = running
    family = _descendants(process.pid)
    (engine,) = _named(family, "engine-rollout")
    os.kill(engine, signal.SIGKILL)
    assert process.wait(60) == 1
    said = process.stderr.read()
    assert "engine-rollout (engine host" in said and "SIGKILL" in said and "last words" in said
    _wait(lambda: not _alive(family), 60, "processes are left")

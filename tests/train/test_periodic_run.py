"""A real run with the periodic schedule: an engine that generates while the trainer trains, taught from other ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_loop import _descendants, _named, _some_groups

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.rollout.journal import read_step, steps
from megatron_dgrpo.rollout.messages import sample_seed

PROMPTS, GROUP = 6, 3


def _config(files: Path, run_dir: Path) -> dict[str, Any]:
    """Two synchronous steps, then three periodic ones with one group at a time and little memory for others."""
    model = {"dtype": "float32"}
    stage = {
        "kind": "dgrpo",
        "data": {"path": str(files / "task/train.jsonl")},
        "engine": "rollout",
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "sampling": {"max_tokens": 24},
        "rewards": [{"kind": "exact_match"}],
        "optimizer": {"lr": 1e-3},
    }
    periodic = {"kind": "periodic", "chunk_groups": 1, "groups_in_memory": 2}
    return {
        "run_dir": str(run_dir),
        "keep_rollouts": 4,
        "models": {
            "student": model | {"path": str(files / "student"), "layout": {"dp": 2}},
            "teacher": model | {"path": str(files / "teacher")},
        },
        "student": "student",
        "teachers": [{"model": "teacher", "ranks": "own"}],
        "engines": {"rollout": {"model": "student", "max_model_len": 40, "kv_cache_bytes": 2**26}},
        "stages": [
            stage | {"steps": 2, "updates_per_batch": 2},
            stage | {"steps": 3, "schedule": periodic, "filter": {"visits": 1}},
        ],
    }


def _load(folder: Path, config: dict[str, Any]) -> Any:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_hop")
    subprocess.run([sys.executable, "-m", "megatron_dgrpo.testing.one_hop_models", str(folder), "0"], check=True)
    return folder


def test_every_sample_is_of_one_version_journalled_and_trained_on_once(files: Path, tmp_path: Path) -> None:
    assert train(_load(tmp_path, _config(files, tmp_path / "run"))) == 0
    updates = [r for r in read_metrics(tmp_path / "run/metrics.jsonl").records if "update" in r]
    assert [(r["stage_number"], r["step"], r["update"]) for r in updates] == [
        *((0, step, update) for step in (1, 2) for update in (1, 2)),
        *((1, step, 1) for step in (1, 2, 3)),
    ]
    for record in updates:  # whatever the parts: the log-probs are those of the same weights, the weights add up to 1
        assert record["mismatch/max"] <= 1e-4 and record["teacher_kl/kl"] > 1e-3
        assert record["teacher_kl/weight"] == pytest.approx(1.0, abs=1e-6)
        assert record["groups"] == PROMPTS and record["nonfinite_rows"] == 0
    seen = [r for r in updates if r["stage_number"] == 1]  # a visit counts from the next step on
    assert [r["filter/always"] + r["filter/never"] for r in seen] == [
        sum(earlier["equal_groups"] for earlier in seen[:number]) for number in range(3)
    ]
    assert [r["preflight/second_score"] < 1e-6 for r in updates if "preflight/second_score" in r] == [True] * 3

    rollouts = tmp_path / "run/rollouts"
    assert steps(rollouts) == [(0, 2), (1, 1), (1, 2), (1, 3)]  # the first step's are not kept
    for (stage, step), version in zip(steps(rollouts), (2, 4, 5, 6), strict=True):
        found = read_step(rollouts, stage, step)
        assert found.generated and found.finished and found.attempts == 1 and not found.untrained
        assert found.began.version == version
        assert len(found.trajectories) == PROMPTS * GROUP
        for trajectory in found.trajectories:
            (segment,) = trajectory.segments
            assert set(segment.weight_versions.tolist()) == {version}
            key = (trajectory.prompt_id, trajectory.sample)
            assert found.seeds[key] == sample_seed(stage, step, *key)
        trained = [sample for update in found.trained for sample in update.samples]
        assert len(trained) == len(set(trained)) == PROMPTS * GROUP
        assert [update.version for update in found.trained] == [version + 1 + i for i in range(len(found.trained))]
        (record, *_) = [r for r in updates if (r["stage_number"], r["step"]) == (stage, step)]
        lengths = [t.num_loss_tokens for t in found.trajectories]
        assert record["response/length"] == pytest.approx(sum(lengths) / len(lengths))
        assert record["tokens"] == sum(lengths) + sum(len(t.prompt_tokens) for t in found.trajectories)
        assert record["loss_tokens"] == (sum(lengths) if stage else record["loss_tokens"])


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_an_engine_that_is_lost_while_the_trainer_trains_answers_for_what_is_left(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """Lost after some groups are there: those stay, the others come from the same weights, and each is used once."""
    config = _config(files, tmp_path / "run")
    config["stages"] = [config["stages"][1] | {"prompts_per_step": 2 * PROMPTS}]
    config["engines"]["rollout"] |= {"max_num_seqs": 1, "hang_timeout_s": 4.0}
    rollouts = tmp_path / "run/rollouts"
    lost: list[int] = []

    def lose() -> None:
        lost.append(_some_groups(tmp_path / "run", 2))
        (engine,) = _named(_descendants(os.getpid()), "engine-rollout")
        os.kill(engine, number)

    thread = threading.Thread(target=lose)
    thread.start()
    assert train(_load(tmp_path, config)) == 0
    thread.join()
    said = capfd.readouterr().out
    assert "engine-rollout is lost in the middle of a batch" in said and "it is started again" in said
    assert lost and lost[0] < 2 * PROMPTS, "it was lost too late"
    updates = [r for r in read_metrics(tmp_path / "run/metrics.jsonl").records if "update" in r]
    assert [r["step"] for r in updates] == [1, 2, 3]
    assert all(r["mismatch/max"] <= 1e-4 and r["groups"] == 2 * PROMPTS for r in updates)
    for step, version in ((1, 0), (2, 1), (3, 2)):
        found = read_step(rollouts, 0, step)
        samples = [(t.prompt_id, t.sample) for t in found.trajectories]
        assert found.generated and found.finished and found.attempts == 1 and not found.untrained
        assert len(samples) == len(set(samples)) == 2 * PROMPTS * GROUP
        assert sorted(sample for update in found.trained for sample in update.samples) == sorted(samples)
        assert {v for t in found.trajectories for s in t.segments for v in s.weight_versions.tolist()} == {version}


def test_what_the_periodic_schedule_cannot_do_is_said_at_once(files: Path, tmp_path: Path) -> None:
    config = _config(files, tmp_path / "run")
    config["stages"][1] |= {"updates_per_batch": 2, "schedule": {"kind": "periodic", "chunk_groups": 7}}
    config["stages"][0] |= {"schedule": {"kind": "periodic", "chunk_groups": 5, "groups_in_memory": 3}}
    config["stages"][0]["updates_per_batch"] = 1
    with pytest.raises(ConfigError) as error:
        train(_load(tmp_path, config))
    for words in (
        r"stages.1.updates_per_batch=1 or stages.1.schedule=synchronous",
        r"stages.1.schedule.chunk_groups: 7 groups never end, of 6",
        r"stages.0.schedule.groups_in_memory: 3 hold no chunk of 5; set it to 5 or more",
    ):
        assert words in str(error.value)
    config["stages"][1]["schedule"] = "asynchronous"
    with pytest.raises(ConfigError, match=r"stages.1.*schedule"):
        _load(tmp_path, config)

"""Runs in forked processes: their exit status, their words, and that nothing of them is left."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from megatron_dgrpo.testing.faults import tiny_run, write_config
from megatron_dgrpo.testing.one_hop_models import write_models
from megatron_dgrpo.testing.preloaded import PreloadedRun


def test_a_refused_config_has_the_command_s_status_and_words(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_run(tmp_path, tmp_path / "run"))
    run = PreloadedRun(config, "seed=none")
    assert run.wait(120) == 2 and "seed" in run.words
    assert not run.folder.exists() and all(server.returncode is not None for server in run.servers.values())
    run = PreloadedRun(config)  # its models are not there
    assert run.wait(120) == 2 and "models.student.path" in run.words


def test_a_supervisor_that_is_killed_takes_everything_with_it(tmp_path: Path) -> None:
    write_models(tmp_path / "files", 0, num_train=32, num_heldout=4)
    config = tiny_run(tmp_path / "files", tmp_path / "run", engines={}, evaluation=None, teachers=[])
    config["stages"] = [config["stages"][0] | {"steps": 100_000}]
    config["models"] = {"student": config["models"]["student"]}
    run = PreloadedRun(write_config(tmp_path / "config.yaml", config))
    deadline = time.monotonic() + 150
    while not (tmp_path / "run/metrics.jsonl").exists() or (tmp_path / "run/metrics.jsonl").stat().st_size == 0:
        assert not run.ended and time.monotonic() < deadline, run.words
        time.sleep(0.01)
    run.supervisor.kill()
    assert run.wait(120) == -signal.SIGKILL
    size = (tmp_path / "run/metrics.jsonl").stat().st_size
    assert [server.returncode is not None for server in run.servers.values()] == [True, True]
    assert (tmp_path / "run/metrics.jsonl").stat().st_size == size

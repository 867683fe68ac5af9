"""`dgrpo train` with engines that are killed, that hang, that are somewhere else: the run goes on, or says why not."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_loop import _alive, _config, _descendants, _named, _wait, _write, files  # noqa: F401

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics


def _long_batches(config: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """One dGRPO stage on two ranks whose batches take long enough to be caught in the middle."""
    stage = config["stages"][1] | {"steps": 3, "prompts_per_step": 8, "group_size": 8, "updates_per_batch": 1}
    config["engines"]["rollout"] |= {"max_num_seqs": 4, "hang_timeout_s": 4.0} | engine
    return config | {"stages": [stage]}


def _busy(pid: int) -> bool:
    """Whether a process has used much of the last half second."""

    def used() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(0.3)
    return used() - before > 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_goes_on_when_its_engine_is_lost(
    files: Path, tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """In whatever it is doing after the first step: the figures of the steps are those of an undisturbed run."""
    records = {}
    for name in ("calm", "disturbed"):
        folder = tmp_path / name
        folder.mkdir()
        config = _long_batches(_config(files, folder / "run"))
        metrics, lost = folder / "run/metrics.jsonl", threading.Event()

        def lose(metrics: Path = metrics, lost: threading.Event = lost) -> None:
            _wait(lambda: metrics.exists() and '"step": 1, "update"' in metrics.read_text(), 150, "no first step")
            (engine,) = _named(_descendants(os.getpid()), "engine-rollout")
            _wait(lambda: _busy(engine), 60, "the engine never worked")
            os.kill(engine, number)
            lost.set()

        killer = threading.Thread(target=lose)
        if name == "disturbed":
            killer.start()
        assert train(load(_write(folder, config))) == 0
        if name == "disturbed":
            killer.join()
            assert lost.is_set(), "nothing was disturbed"
        records[name] = [r for r in read_metrics(metrics).records if "update" in r]
    said = capfd.readouterr().out
    assert "is lost" in said and "engine-rollout (pid" in said and "it is started again" in said
    assert [r["step"] for r in records["disturbed"]] == [1, 2, 3]
    for calm, disturbed in zip(records["calm"], records["disturbed"], strict=True):
        assert disturbed["mismatch/max"] <= 1e-4
        for figure in ("reward/mean", "response/length", "tokens"):
            assert disturbed[figure] == pytest.approx(calm[figure], abs=1e-6), figure
    assert not list(Path("/dev/shm").glob("dgrpo-*"))

"""An engine cut over two processes: one of them is killed or stops in a batch, and the engine comes back whole."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rollout_support import difference
from test_rollout_resilience import HANG_S, Trainer, supervise

from megatron_dgrpo.launch.nursery_server import _children_of


def _workers(host: int) -> list[int]:
    children = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in _children_of(host)}
    return sorted(pid for pid, command in children.items() if b"resource_tracker" not in command)


def loses_workers(folder: str, **places: Any) -> None:
    trainer = Trainer(**places)
    trainer.push()
    calm, seen = trainer.batch(), set[int]()
    for number in (signal.SIGKILL, signal.SIGSTOP):
        (host,) = trainer.pids()
        workers = _workers(host)
        assert len(workers) == 2, workers
        seen |= {host, *workers}
        found = trainer.batch(4, lambda pid=workers[1], number=number: os.kill(pid, number))
        assert "is lost in the middle of a batch" in found["notes"][0], found["notes"]
        assert number != signal.SIGSTOP or f"has not answered for {HANG_S:g} s: it hangs" in found["notes"][0]
        assert difference(calm["answers"], found["answers"]) <= 1e-4
        assert trainer.pids() != [host], "another one was started"
    Path(folder, "done").write_text(json.dumps(sorted(seen)))


@pytest.mark.long
def test_a_worker_that_is_killed_or_hangs_costs_a_restart_and_no_sample(
    untied_folders: list[str], tmp_path: Path
) -> None:
    supervise(tmp_path, untied_folders, "loses_workers", tp=2, module="test_rollout_lost_workers")
    left = [pid for pid in json.loads((tmp_path / "done").read_text()) if Path(f"/proc/{pid}").exists()]
    assert not left

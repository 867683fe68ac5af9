"""Engine hosts that are started again: after a pause, with their socket out of the way, and not for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_supervisor import NO_IMPORTS, gone, publish, published

from megatron_dgrpo.errors import LaunchError, RolloutError
from megatron_dgrpo.launch.supervisor import Supervisor
from megatron_dgrpo.rollout.control import Control

# ---- what the processes run ----


def host(folder: str, socket: str, does: str) -> None:
    """The first one serves; what the others do is said."""
    number = len(list(Path(folder).glob("host*")))
    assert not Path(socket).exists(), "the socket of the old process is in the way"
    if does == "serve" or number == 0:
        Path(socket).touch()
    publish(Path(folder, f"host{number}"), os.getpid())
    if does == "raise" and number > 0:
        raise ValueError("the cable came off")
    time.sleep(600)


def rank(folder: str, ends: int, awaits: int) -> None:
    """Kills hosts, one after the other, and ends well."""
    for number in range(ends):
        pid = published(Path(folder, f"host{number}"))
        time.sleep(0.3)  # for the supervisor to see its socket
        os.kill(pid, signal.SIGKILL)
    published(Path(folder, f"host{awaits}"))


def waiting(folder: str) -> None:
    published(Path(folder, "over"), 100)


def run(folder: Path, ends: int, awaits: int, *, does: str = "serve", max_restarts: int = 3) -> float:
    start = time.monotonic()
    with Supervisor(folder, echo=None, preload=NO_IMPORTS) as supervisor:
        path = supervisor.private_dir / "host.sock"
        args = {"folder": str(folder), "socket": str(path), "does": does}
        supervisor.start_engine("host", "test_keeper:host", args, socket=path, max_restarts=max_restarts)
        supervisor.start_ranks(
            "test_keeper:rank", {"folder": str(folder), "ends": ends, "awaits": awaits}, world_size=1
        )
        supervisor.watch()
    return time.monotonic() - start


def test_pauses_double_and_a_run_ends_well(tmp_path: Path) -> None:
    assert run(tmp_path, 2, 2) >= 1 + 2
    assert all(gone(published(tmp_path / f"host{i}")) for i in range(3))


def test_one_end_too_many_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        LaunchError, match=r"(?s)host \(engine host, pid .*SIGKILL.*started again 1 times.*restarts=1\)"
    ):
        run(tmp_path, 2, 2, max_restarts=1)
    assert not (tmp_path / "host2").exists()


def test_one_that_served_once_may_fail_at_its_start_later(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"(?s)exited with status 1.*started again 2 times.*the cable came off"):
        run(tmp_path, 1, 5, does="raise", max_restarts=2)


def test_only_the_process_that_is_meant_is_discarded_and_only_with_the_key(tmp_path: Path) -> None:
    with Supervisor(tmp_path, echo=None, preload=NO_IMPORTS) as supervisor:
        address, path = supervisor.listen(), supervisor.private_dir / "host.sock"
        args = {"folder": str(tmp_path), "socket": str(path), "does": "serve"}
        child = supervisor.start_engine("host", "test_keeper:host", args, socket=path, max_restarts=1)
        supervisor.start_ranks("test_keeper:waiting", {"folder": str(tmp_path)}, world_size=1)
        supervisor.wait_until(path.exists, what="it did not serve", timeout_s=60)
        report = _elsewhere(lambda: Control(address, "x" * 32).discard("host", child.pid, "a stranger says so"))
        supervisor.wait_until(lambda: bool(report), what="no answer", timeout_s=60)
        assert isinstance(report[0], RolloutError) and "refused this run's key" in str(report[0])
        control = Control(address, supervisor.key)
        for name, pid in (("host", child.pid + 1), ("other", child.pid)):
            report = _elsewhere(lambda name=name, pid=pid: control.discard(name, pid, "hangs"))
            supervisor.wait_until(lambda report=report: bool(report), what="no answer", timeout_s=60)
            assert report == [None] and not gone(child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        report = _elsewhere(lambda: control.discard("host", child.pid, "it hangs"))
        supervisor.wait_until(lambda: (tmp_path / "host1").exists(), what="no other host", timeout_s=60)
        assert report == [None] and gone(child.pid)
        publish(tmp_path / "over", True)
        supervisor.watch()


def _elsewhere(call):  # type: ignore[no-untyped-def]
    """What a call in another thread returned or raised, once it has."""
    report = []

    def run() -> None:
        try:
            report.append(call())
        except RolloutError as error:
            report.append(error)

    threading.Thread(target=run, daemon=True).start()
    return report


def test_nobody_needs_another_one_when_a_rank_is_done(tmp_path: Path) -> None:
    with Supervisor(tmp_path, echo=None, preload=NO_IMPORTS) as supervisor:
        path = supervisor.private_dir / "host.sock"
        args = {"folder": str(tmp_path), "socket": str(path), "does": "serve"}
        child = supervisor.start_engine("host", "test_keeper:host", args, socket=path, max_restarts=3)
        first, last = tmp_path / "first", tmp_path / "last"
        for folder in (first, last):
            folder.mkdir()
            supervisor.start_ranks("test_keeper:waiting", {"folder": str(folder)}, world_size=1)
        publish(first / "over", True)
        done = supervisor.processes[1].child
        supervisor.wait_until(lambda: done.returncode == 0, what="no rank ended", timeout_s=60)
        child.kill(signal.SIGKILL)
        end = time.monotonic() + 2
        supervisor.wait_until(lambda: time.monotonic() > end, what="no end", timeout_s=60)
        publish(last / "over", True)
        supervisor.watch()
    assert not (tmp_path / "host1").exists()

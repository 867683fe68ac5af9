"""What hangs without ending: the servers of processes, and a rank 0 that nobody waits for."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_supervisor import (
    NO_IMPORTS,
    assert_nothing_is_left,
    eventually,
    launch,
    published,
    wait_for_all,
)

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch import watchdog
from megatron_dgrpo.launch.supervisor import Supervisor
from megatron_dgrpo.observe import pulse
from megatron_dgrpo.observe.pulse import Pulse

# ---- what the processes run ----


def stalls(folder: str) -> None:
    """Works for a while, then waits for what never comes."""
    pulse.INTERVAL_S = 0.05
    Pulse()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.01 if int(time.monotonic() * 50) % 2 else 0.02)
    Path(folder, "stalls").write_text(str(os.getpid()))
    waits_for_ever()


def waits_for_ever() -> None:
    threading.Event().wait()


# ---- the tests ----


@pytest.mark.parametrize("kind", ["trainer", "engine"])
def test_a_server_that_hangs_ends_the_run_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nobody would hear of the end of its processes any more."""
    monkeypatch.setattr(watchdog, "ASK_S", 0.2)
    with Supervisor(tmp_path, preload=NO_IMPORTS, echo=None, grace_s=1.0) as run:
        launch(run, tmp_path, "wait", "serve")
        wait_for_all(tmp_path)
        run.wait_until(lambda: run._nurseries[kind]._asked_at is not None, what="no question", timeout_s=60)
        run.wait_until(lambda: run._nurseries[kind]._asked_at is None, what="no answer", timeout_s=60)
        monkeypatch.setattr(watchdog, "ANSWER_S", 3.0)
        server = run._nurseries[kind].server.pid
        os.kill(server, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(LaunchError, match=rf"server \(pid {server}\) has not answered for 3 s: it hangs; the run"):
            run.watch()
        assert time.monotonic() - start < 30
        assert_nothing_is_left(tmp_path, run.private_dir, run.shm_prefix)


def test_a_rank_that_shows_no_sign_of_life_ends_the_run_and_says_where_it_is(tmp_path: Path) -> None:
    with Supervisor(tmp_path, preload=NO_IMPORTS, grace_s=1.0, stall_s=4.0) as run:
        (child,) = run.start_ranks("test_watchdog:stalls", {"folder": str(tmp_path)}, world_size=1)
        start = time.monotonic()
        with pytest.raises(LaunchError, match="rank0 has shown no sign of life for 4 s .stall_timeout_s") as caught:
            run.watch()
        assert 4.0 <= time.monotonic() - start < 60
    assert "in waits_for_ever" in str(caught.value)
    assert published(tmp_path / "stalls") == child.pid and child.returncode is not None


def test_a_pulse_is_that_of_the_thread_and_not_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "INTERVAL_S", 0.01)
    board, path = tmp_path / "board", tmp_path / f"board{pulse.SUFFIX}"
    work, rest = threading.Event(), threading.Event()
    pulses = []

    def run() -> None:
        pulses.append(Pulse(board))
        while not work.is_set():
            sum(range(1000))
        rest.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert eventually(path.exists, 60)
        seen = path.read_text()
        assert eventually(lambda: path.read_text() not in ("", seen), 60), "it works"
        work.set()
        deadline = time.monotonic() + 60
        while (before := path.read_text()) and time.monotonic() < deadline:  # from some moment on it stays
            time.sleep(0.3)
            if path.read_text() == before:
                break
        else:
            raise AssertionError("it waits, and counts on")
    finally:
        work.set()
        rest.set()
        thread.join()
        pulses[0].stop()
    Pulse().stop()  # nobody watches: nothing is written

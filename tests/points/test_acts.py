"""The operations at points: what they do without a plan, and how each fault strikes before, half way and after."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dgrpo import points
from megatron_dgrpo.points.plan import AFTER, HALF, Fault
from megatron_dgrpo.testing.faults import plan, reached, struck

RECORD = bytes(range(100))

# What one process does in a folder, once with everything.
WORK = """
import os, socket, sys
from megatron_dgrpo import points
os.chdir(sys.argv[1])
file = points.open_file("journal.open", "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
for _ in range(2):
    try:
        points.write("journal.record", file, bytes(range(100)))
    except OSError as error:
        print(error.errno)
points.sync("journal.sync", file)
at = os.open("at", os.O_RDWR | os.O_CREAT)
points.write_at("export.block", at, bytes(range(100)), 50)
points.write_file("checkpoint.trainer", "small", b"a" * 100)
with points.stream("tensors.data", "tensors.data_sync", "stream") as stream:
    stream.write(b"b" * 100)
os.makedirs("old/inner")
for name in "abcd":
    open(f"old/inner/{name}", "w").close()
points.rename("prune.name", "old", "doomed")
points.remove_tree("prune.tree", "doomed")
points.cut("journal.undo", file, os.fstat(file).st_size - 10)
points.remove("journal.forget", "small")
points.remove("links.unlink", "small", missing_ok=True)
one, other = socket.socketpair()
try:
    points.send_all("links.line", one, bytes(range(100)))
    points.send("wire.send", one, bytes(range(100)))
except BrokenPipeError:
    print("closed")
points.reached("step.begin")
print("done")
"""


def _work(folder: Path, *faults: Fault, record: bool = False) -> subprocess.CompletedProcess[str]:
    (folder / "work").mkdir()
    env = {**os.environ, **plan(folder / "plan", *faults, record=record), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORK, str(folder / "work")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


def _left(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder / "work")): path.stat().st_size
        for path in (folder / "work").rglob("*")
        if path.is_file()
    }


def test_without_faults_all_is_done_and_every_point_is_recorded(tmp_path: Path) -> None:
    done = _work(tmp_path, record=True)
    assert done.stdout == "done\n", done.stderr
    assert _left(tmp_path) == {"log": 190, "at": 150, "stream": 100}
    counts = reached(tmp_path / "plan")["supervisor"]
    assert counts["journal.record"] == 2 and counts["tensors.data_sync"] == 1 and len(counts) == 15


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        (Fault("journal.open", "kill"), {}),
        (Fault("journal.record", "kill", nth=2), {"log": 100}),
        (Fault("journal.record", "kill", HALF, nth=2), {"log": 150}),
        (Fault("journal.record", "kill", AFTER, nth=2), {"log": 200}),
        (Fault("export.block", "kill", HALF), {"log": 200, "at": 100}),
        (Fault("checkpoint.trainer", "kill", HALF), {"log": 200, "at": 150, "small": 50}),
        (Fault("prune.name", "kill"), {"old": 4}),
        (Fault("prune.name", "kill", AFTER), {"doomed": 4}),
        (Fault("prune.tree", "kill", HALF), {"doomed": 2}),
        (Fault("journal.undo", "kill", AFTER), {"log": 190, "doomed": 0}),
        (Fault("journal.forget", "kill"), {"small": 100}),
    ],
)  # fmt: skip
def test_a_kill_leaves_what_was_done_before_it(fault: Fault, left: dict[str, int], tmp_path: Path) -> None:
    done = _work(tmp_path, fault)
    assert done.returncode == -signal.SIGKILL and struck(tmp_path / "plan") == 1
    found = _left(tmp_path)
    for name, size in left.items():
        if name in ("old", "doomed"):
            assert sum(path.startswith(name) for path in found) == size, found
        else:
            assert found[name] == size
    assert left or not found


def test_a_disk_that_fills_half_way_and_a_connection_that_closes(tmp_path: Path) -> None:
    done = _work(tmp_path, Fault("journal.record", "no_space", HALF), Fault("links.line", "close", HALF))
    assert done.stdout.split() == [str(errno.ENOSPC), "closed", "done"]
    assert _left(tmp_path)["log"] == 140 and struck(tmp_path / "plan") == 2


@pytest.mark.parametrize(("act", "size"), [("truncate", 90), ("corrupt", 190)])
def test_what_was_just_written_is_damaged(act: str, size: int, tmp_path: Path) -> None:
    faults = (Fault("journal.record", act, AFTER, nth=2), Fault("journal.undo", "kill"))
    assert _work(tmp_path, *faults).returncode == -signal.SIGKILL
    content = (tmp_path / "work/log").read_bytes()
    whole = RECORD + RECORD
    assert len(content) == (150 if act == "truncate" else 200)
    assert content[:150] == whole[:150] and (
        act == "truncate" or sum(a != b for a, b in zip(content, whole, strict=True)) == 1
    )


def test_a_fault_strikes_once_in_its_role_and_a_stopped_process_goes_on(tmp_path: Path) -> None:
    other = Fault("journal.record", "kill", role="rank7")
    late = Fault("step.begin", "sleep", seconds=0.01)
    done = _work(tmp_path, other, late)
    assert done.stdout == "done\n" and struck(tmp_path / "plan") == 1
    env = {
        **os.environ,
        **plan(tmp_path / "stop", Fault("step.begin", "stop")),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    (tmp_path / "again").mkdir()
    process = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path / "again")], env=env, stdout=subprocess.PIPE)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == b"done\n"


def test_without_a_plan_a_send_says_how_much_was_taken() -> None:
    one, other = socket.socketpair()
    one.setblocking(False)
    taken = points.send("wire.send", one, b"x" * 10_000_000)
    assert 0 < taken < 10_000_000 and other.recv(1) == b"x"
    one.close()
    other.close()

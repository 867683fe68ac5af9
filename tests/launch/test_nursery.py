"""A nursery's processes: how they start, what they find, how they end, and that none outlives its owner."""

import contextlib
import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch.nursery import Nursery, in_words, last_lines

# ---- what the processes run ----


def report(path: str, **values: object) -> None:
    found = {
        "values": values,
        "env": os.environ.get("NURSERY_TEST"),
        "fds": {int(fd) for fd in os.listdir("/proc/self/fd")} - {0, 1, 2},
        "comm": Path("/proc/self/comm").read_text().strip(),
        "stdin": sys.stdin.read(),
        "ppid": os.getppid(),
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
    print("out"), print("err", file=sys.stderr)
    Path(path).write_text(repr(found))


def end(how: str) -> None:
    match how:
        case "raise":
            raise ValueError("what went wrong")
        case "status":
            sys.exit(3)
        case "words":
            sys.exit("said on leaving")
        case "abrupt":
            os._exit(7)
        case "crash":
            ctypes.string_at(0)


def share(paths: list[str], ready: str) -> None:
    """Maps shared memory, making what is not there."""
    mapped = []
    for path in paths:
        with open(path, "a+b") as file:
            if not os.path.getsize(path):
                file.truncate(4096)
            mapped.append(mmap.mmap(file.fileno(), 4096))
    publish(ready, [os.getpid()])
    time.sleep(600)


def stay(pids: str, shm: str | None = None, deaf: bool = False, leaves_group: bool = True) -> None:
    """Runs on, with a grandchild that may have left the process group; writes both process ids."""
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: (print("goodbye"), sys.exit(0)))
    if shm:
        Path(shm).write_bytes(b"shared")
    grandchild = subprocess.Popen(["sleep", "600"], start_new_session=leaves_group)
    publish(pids, [os.getpid(), grandchild.pid])
    while True:
        time.sleep(600)


def leave_an_heir(pids: str, left: str) -> None:
    """Dies by SIGKILL, leaving one process that never ends and one that has half a second's work to do."""
    worker = subprocess.Popen(["sh", "-c", f"sleep 0.5; echo done > {left}"])
    idler = subprocess.Popen(["sleep", "600"], start_new_session=True)
    publish(pids, [worker.pid, idler.pid])
    os.kill(os.getpid(), signal.SIGKILL)


def own(pids: str, private_dir: str, shm_prefix: str, preload: list[str]) -> None:
    """The owner of a nursery, in a process that a test can kill."""
    folder = Path(pids).parent
    nursery = Nursery(
        preload, log_path=folder / "server.log", private_dir=Path(private_dir), shm_prefix=Path(shm_prefix).name
    )
    if not preload:
        args = {"pids": pids, "shm": shm_prefix + "weights"}
        nursery.start("stay", "test_nursery:stay", args, log_path=folder / "stay.log")
    publish(folder / "server_pid", [nursery.server.pid])
    time.sleep(600)


# ---- helpers ----


def publish(path: str | Path, content: object) -> None:
    aside = Path(f"{path}.new")
    aside.write_text(json.dumps(content))
    os.replace(aside, path)


def eventually(condition, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(true)


def published(path: str | Path) -> list[int]:
    assert eventually(Path(path).exists), f"{path} was not written"
    return json.loads(Path(path).read_text())


def gone(pid: int) -> bool:
    """The process has ended (whether or not its parent has waited for it)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


@pytest.fixture
def nursery(tmp_path):
    with Nursery((), log_path=tmp_path / "server.log") as nursery:
        yield nursery


def start(nursery: Nursery, tmp_path: Path, function: str, name: str = "child", **args: object):
    return nursery.start(name, f"test_nursery:{function}", args, log_path=tmp_path / f"{name}.log")


# ---- starting ----


def test_a_child_gets_its_arguments_environment_and_log_and_nothing_of_the_server(nursery, tmp_path):
    out = tmp_path / "report"
    child = nursery.start(
        "a-rank-with-a-name",
        "test_nursery:report",
        {"path": str(out), "n": 1, "nested": {"a": [1, None]}},
        env={"NURSERY_TEST": "yes"},
        log_path=tmp_path / "logs" / "child.log",
    )
    assert child.wait(60) == 0 and child.poll() == 0
    found = eval(out.read_text())
    assert found["values"] == {"n": 1, "nested": {"a": [1, None]}}
    assert found["env"] == "yes" and "NURSERY_TEST" not in os.environ
    assert len(found["fds"]) <= 1, "more than the listing's own descriptor: the child holds some of the server's"
    assert found["comm"] == "a-rank-with-a-name"[:15]
    assert found["stdin"] == "" and found["sigterm"] and found["ppid"] == nursery.server.pid
    assert child.last_words().splitlines() == ["out", "err"]
    assert oct((tmp_path / "logs" / "child.log").stat().st_mode & 0o777) == "0o600"


def test_imports_are_made_once_and_shared(tmp_path, monkeypatch):
    (tmp_path / "costly.py").write_text("import os\nopen(os.environ['COUNT'], 'a').write('x')\ndef use(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    count = tmp_path / "count"
    with Nursery(("costly",), log_path=tmp_path / "server.log", env={"COUNT": str(count)}) as nursery:
        children = [nursery.start(f"c{i}", "costly:use", {}, log_path=tmp_path / "log") for i in range(5)]
        assert [child.wait(60) for child in children] == [0] * 5
    assert count.read_text() == "x"


def test_a_module_that_cannot_be_imported_is_reported_with_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no such device')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Nursery(("json", "broken_module"), log_path=tmp_path / "server.log") as nursery:
        with pytest.raises(LaunchError, match=r"(?s)could not import broken_module.*no such device"):
            nursery.start("child", "test_nursery:end", {"how": "raise"}, log_path=tmp_path / "log")


def test_imports_that_take_too_long_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    nursery = Nursery(("endless",), log_path=tmp_path / "server.log")
    with pytest.raises(LaunchError, match="imports took more than 0.5 s"):
        nursery.wait_ready(0.5)
    nursery.close()
    assert gone(nursery.server.pid)


# ---- ending ----


@pytest.mark.parametrize(
    ("how", "status", "words", "last"),
    [
        ("return", 0, "exited with status 0", ""),
        ("raise", 1, "exited with status 1", "ValueError: what went wrong"),
        ("status", 3, "exited with status 3", ""),
        ("words", 1, "exited with status 1", "said on leaving"),
        ("abrupt", 7, "exited with status 7", ""),
        ("crash", -signal.SIGSEGV, "was killed by SIGSEGV (Segmentation fault)", "test_nursery.py"),
    ],
)
def test_exit_statuses(nursery, tmp_path, how, status, words, last):
    child = start(nursery, tmp_path, "end", how=how)
    assert child.wait(60) == status
    assert in_words(status) == words
    assert last in child.last_words()
    assert 0 <= time.monotonic() - child.died_at < 60


def test_waiting_has_a_limit_and_a_killed_child_says_so(nursery, tmp_path):
    child = start(nursery, tmp_path, "stay", pids=str(tmp_path / "pids"))
    with pytest.raises(LaunchError, match="still runs after 0.1 s"):
        child.wait(0.1)
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
    child.kill()  # nobody is there any more: nothing happens


def test_a_child_that_hangs_shows_where(nursery, tmp_path):
    child = start(nursery, tmp_path, "stay", pids=str(tmp_path / "pids"))
    published(tmp_path / "pids")
    child.kill(signal.SIGUSR1)
    assert eventually(lambda: " in stay" in child.last_words())
    assert child.poll() is None


def test_closing_asks_first_and_kills_then(tmp_path):
    with Nursery((), log_path=tmp_path / "server.log") as nursery:
        polite = start(nursery, tmp_path, "stay", "polite", pids=str(tmp_path / "polite"))
        deaf = start(nursery, tmp_path, "stay", "deaf", pids=str(tmp_path / "deaf"), deaf=True)
        pids = published(tmp_path / "polite") + published(tmp_path / "deaf")
        nursery.close(grace_s=1.0)
    assert polite.returncode == 0 and polite.last_words() == "goodbye"
    assert deaf.returncode == -signal.SIGKILL
    assert all(gone(pid) for pid in [*pids, nursery.server.pid])


def test_orphans_of_a_killed_child_finish_their_work_but_do_not_stay(nursery, tmp_path):
    child = start(nursery, tmp_path, "leave_an_heir", pids=str(tmp_path / "pids"), left=str(tmp_path / "left"))
    assert child.wait(60) == -signal.SIGKILL
    pids = published(tmp_path / "pids")
    assert eventually(lambda: all(gone(pid) for pid in pids), within_s=8)
    assert (tmp_path / "left").read_text() == "done\n"


def test_nothing_outlives_the_server(nursery, tmp_path):
    child = start(nursery, tmp_path, "stay", pids=str(tmp_path / "pids"), leaves_group=False)
    pids = published(tmp_path / "pids")
    os.kill(nursery.server.pid, signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert not nursery.alive and eventually(lambda: all(gone(pid) for pid in pids))
    with pytest.raises(LaunchError, match="was killed by SIGKILL"):
        start(nursery, tmp_path, "report", path=str(tmp_path / "never"))


@pytest.mark.parametrize("when", ["running", "importing"])
def test_nothing_outlives_an_owner_that_is_killed(tmp_path, monkeypatch, when):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)\n")
    private, shm = tmp_path / "private", f"/dev/shm/dgrpo-test-{os.getpid()}-"
    private.mkdir()
    (private / "socket").touch()
    call = {
        "pids": str(tmp_path / "pids"),
        "private_dir": str(private),
        "shm_prefix": shm,
        "preload": ["endless"] if when == "importing" else [],
    }
    owner = own_elsewhere(call, tmp_path)
    pids = published(tmp_path / "server_pid")
    if when == "running":
        pids += published(tmp_path / "pids")
        assert Path(shm + "weights").exists()
    assert len(pids) == (3 if when == "running" else 1) and not any(gone(pid) for pid in pids)
    time.sleep(0.3 if when == "importing" else 0)
    owner.kill()
    owner.wait()
    assert eventually(lambda: all(gone(pid) for pid in pids)), "a process is left"
    assert not private.exists() and not Path(shm + "weights").exists()


def test_shared_memory_of_libraries_is_removed_and_no_one_elses(tmp_path):
    made, others, older = (Path(f"/dev/shm/{kind}-{os.getpid()}") for kind in ("library", "dgrpo-other", "older"))
    older.write_bytes(bytes(4096))
    try:
        with Nursery((), log_path=tmp_path / "server.log") as nursery:
            paths = [str(made), str(others), str(older)]
            start(nursery, tmp_path, "share", paths=paths, ready=str(tmp_path / "ready"))
            published(tmp_path / "ready")
            assert made.exists()
        assert not made.exists() and others.exists() and older.exists()
    finally:
        for path in (made, others, older):
            path.unlink(missing_ok=True)


def test_children_do_not_need_the_owner_to_die_with_the_server(tmp_path):
    (tmp_path / "private").mkdir()
    call = {
        "pids": str(tmp_path / "pids"),
        "private_dir": str(tmp_path / "private"),
        "shm_prefix": f"/dev/shm/dgrpo-test-{os.getpid()}-",
        "preload": [],
    }
    owner = own_elsewhere(call, tmp_path)  # it sleeps, and will not look
    child, grandchild = published(tmp_path / "pids")
    os.kill(published(tmp_path / "server_pid")[0], signal.SIGKILL)
    assert eventually(lambda: gone(child), within_s=5)
    os.kill(grandchild, signal.SIGKILL)  # it left the group, and nobody is there to adopt it
    os.unlink(call["shm_prefix"] + "weights")
    owner.kill()
    owner.wait()


def own_elsewhere(call: dict, tmp_path: Path) -> subprocess.Popen:
    paths = [str(tmp_path), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths}; import test_nursery; test_nursery.own(**{call})"
    return subprocess.Popen([sys.executable, "-c", code])


def test_last_lines_are_the_last_without_noise(tmp_path):
    log = tmp_path / "log"
    assert last_lines(log) == ""
    log.write_text("".join(f"{i}\n[Gloo] Rank {i} is connected\n" for i in range(50)) + "unfinished")
    assert last_lines(log, 3) == "48\n49\nunfinished"


def test_an_engines_last_words_are_not_the_warnings_of_every_start(tmp_path):
    noise = [
        "(MainProcess pid=1) WARNING 11-21 10:56:12 [cpu_worker.py:114] libiomp is not found in LD_PRELOAD. For best",
        "(MainProcess pid=1) WARNING 11-21 10:56:11 [vllm.py:1703] Enforce eager set, disabling torch.compile, ...",
        "Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]\rLoading safetensors checkpoint"
        " shards: 100% Completed | 1/1 [00:00<00:00, 154.61it/s]",
        "",
        "(MainProcess pid=1) WARNING 11-21 10:56:12 [base.py:413] Using None for EOS token id because tokenizer is not",
    ]
    other = "(MainProcess pid=1) WARNING 11-21 10:56:12 [base.py:413] the disk is full"
    log = tmp_path / "log"
    log.write_text("\n".join(["Traceback", "  one", "ValueError: too long", other, *noise * 10]) + "\n")
    assert last_lines(log, 20).strip().splitlines()[-3:] == ["  one", "ValueError: too long", other]
    log.write_text("\n".join(noise))
    assert last_lines(log) == ""

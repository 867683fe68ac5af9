"""A supervised run ends well, by a failure or by a signal; it names the first cause and leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch.nursery import TRAINER_PRELOAD
from megatron_dgrpo.launch.supervisor import Supervisor

NO_IMPORTS = {"trainer": (), "engine": ()}
HERE = str(Path(__file__).parent)

# ---- what the processes run ----


def rank(folder: str, does: str) -> None:
    me = int(os.environ["RANK"])
    print(f"rank {me} of {os.environ['WORLD_SIZE']} with {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    publish(Path(folder, f"rank{me}"), [os.getpid()])
    match does:
        case "return":
            return
        case "raise":
            if me == 1:
                raise ValueError("the batch was empty")
            time.sleep(600)
        case "notice":  # as a client notices that its engine's socket is closed
            (engine,) = published(Path(folder, "engine"))[:1]
            while not gone(engine):
                time.sleep(0.001)
            raise ConnectionError("the engine has gone")
        case "wait":
            time.sleep(600)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            publish(Path(folder, f"deaf{me}"), True)
            time.sleep(600)
        case "reduce":
            reduce_for_ever(folder)


def reduce_for_ever(folder: str) -> None:
    import torch
    import torch.distributed as dist

    from megatron_dgrpo.launch.rendezvous import join_world

    join_world("gloo", 60)
    x = torch.full((2,), dist.get_rank() + 1.0)
    dist.all_reduce(x)
    publish(Path(folder, f"sum{dist.get_rank()}"), x.tolist())
    if dist.get_rank() == 0:
        time.sleep(600)  # the others hang in their collective
    dist.all_reduce(x)


def engine(folder: str, does: str, private_dir: str, shm_prefix: str) -> None:
    """Has what a real one has: a file in the private folder, shared memory, a worker process."""
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(private_dir, "engine.sock").touch()
    Path(f"/dev/shm/{shm_prefix}weights").write_bytes(b"1234")
    print("serving", flush=True)
    publish(Path(folder, "engine"), [os.getpid(), worker.pid])
    if does == "end":
        return
    time.sleep(600)


def supervise(folder: str, ranks: str, grace_s: float, preload: bool) -> None:
    """A whole run in a process that a test can signal."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)  # ignored where the tests run in the background
    kinds = {"trainer": TRAINER_PRELOAD if preload else (), "engine": ()}
    with Supervisor(folder, grace_s=grace_s, preload=kinds) as run:
        publish(Path(folder, "private"), [str(run.private_dir), run.shm_prefix])
        launch(run, Path(folder), ranks, "serve")
        run.watch()


# ---- helpers ----


def publish(path: Path, content: object) -> None:
    aside = Path(f"{path}.new")
    aside.write_text(json.dumps(content))
    os.replace(aside, path)


def published(path: Path, within_s: float = 60.0):
    assert eventually(path.exists, within_s), f"{path} was not written"
    return json.loads(path.read_text())


def eventually(condition, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(true)


def gone(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def wait_for_all(folder: Path, *more: str) -> None:
    for name in ("engine", "rank0", "rank1", *more):
        published(folder / name)


def launch(run: Supervisor, folder: Path, ranks: str, serves: str, world_size: int = 2) -> None:
    its = {"folder": str(folder), "private_dir": str(run.private_dir), "shm_prefix": run.shm_prefix}
    run.start_engine("rollout", "test_supervisor:engine", {**its, "does": serves})
    args = {"folder": str(folder), "does": ranks}
    run.start_ranks("test_supervisor:rank", args, world_size=world_size, threads=3)


def assert_nothing_is_left(folder: Path, private_dir: str | Path, shm_prefix: str, world_size: int = 2) -> None:
    pids = published(folder / "engine") + [published(folder / f"rank{r}")[0] for r in range(world_size)]
    assert eventually(lambda: all(gone(pid) for pid in pids)), f"left: {[pid for pid in pids if not gone(pid)]}"
    assert eventually(lambda: not Path(private_dir).exists())
    assert eventually(lambda: not list(Path("/dev/shm").glob(f"{shm_prefix}*")))


def fails(folder: Path, ranks: str, serves: str, act=lambda run: None) -> str:
    """The message of a run that fails; it has left nothing."""
    with Supervisor(folder, preload=NO_IMPORTS, echo=None) as run:
        launch(run, folder, ranks, serves)
        act(run)
        start = time.monotonic()
        with pytest.raises(LaunchError) as caught:
            run.watch()
        assert time.monotonic() - start < 60
        assert_nothing_is_left(folder, run.private_dir, run.shm_prefix)
    return str(caught.value)


# ---- in this process ----


def test_a_run_that_ends_well_stops_its_engine_and_leaves_only_logs(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with Supervisor(tmp_path, preload=NO_IMPORTS) as run:
        assert run.private_dir.stat().st_mode & 0o777 == 0o700 and len(str(run.private_dir)) < 80
        assert len(bytes.fromhex(run.key)) == 32
        launch(run, tmp_path, "return", "serve")
        run.wait_until((tmp_path / "engine").exists, what="the engine was not ready", timeout_s=60)
        run.watch()
        assert run.processes[0].child.returncode is None, "the engine runs until the run is stopped"
    assert signal.getsignal(signal.SIGTERM) is before
    assert_nothing_is_left(tmp_path, run.private_dir, run.shm_prefix)
    assert capsys.readouterr().out == "rank 0 of 2 with 3 threads\n"
    assert (tmp_path / "logs" / "rank1.log").read_text() == "rank 1 of 2 with 3 threads\n"
    assert (tmp_path / "logs" / "rollout.log").read_text() == "serving\n"


def test_a_killed_engine_ends_the_run_with_its_name_and_last_words(tmp_path):
    def kill(run: Supervisor) -> None:
        wait_for_all(tmp_path)
        os.kill(published(tmp_path / "engine")[0], signal.SIGKILL)

    message = fails(tmp_path, "notice", "serve", kill)
    first, *rest = message.splitlines()
    assert first.startswith("rollout (engine host, pid ") and "was killed by SIGKILL" in first
    assert "After it: rank" in message and "exited with status 1" in message  # the ranks noticed, and are not the cause
    assert rest[-1] == "serving"


def test_a_rank_that_raises_is_named_and_the_rest_is_stopped(tmp_path):
    message = fails(tmp_path, "raise", "serve")
    assert message.startswith("rank1 (trainer rank, pid ") and "exited with status 1; the run is stopped." in message
    assert message.endswith("ValueError: the batch was empty") and "After it" not in message


def test_an_engine_must_not_end_of_itself(tmp_path):
    message = fails(tmp_path, "wait", "end")
    assert message.startswith("rollout ") and "It ended of itself, before it was told to." in message


def test_a_dead_server_is_the_cause_named(tmp_path):
    message = fails(tmp_path, "wait", "serve", _kill_trainer_server)
    assert "server (pid " in message and "was killed by SIGKILL" in message


def _kill_trainer_server(run: Supervisor) -> None:
    wait_for_all(run.log_dir.parent)
    os.kill(run._nurseries["trainer"].server.pid, signal.SIGKILL)


def test_what_is_not_ready_in_time_shows_where_it_hangs(tmp_path):
    with Supervisor(tmp_path, preload=NO_IMPORTS, echo=None) as run:
        launch(run, tmp_path, "wait", "serve")
        wait_for_all(tmp_path)
        with pytest.raises(LaunchError) as caught:
            run.wait_until(lambda: False, what="The engine 'rollout' was not ready", timeout_s=0.5)
        assert_nothing_is_left(tmp_path, run.private_dir, run.shm_prefix)
    message = str(caught.value)
    assert message.startswith("The engine 'rollout' was not ready after 0.5 s.\nrollout's last words:\nserving\n")
    assert "in engine" in message and "in rank" in message


def test_an_import_that_fails_beside_others_is_reported(tmp_path, monkeypatch):
    (tmp_path / "unfit.py").write_text("raise RuntimeError('built for another processor')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Supervisor(tmp_path, preload={"trainer": (), "engine": ("unfit",)}) as run:
        run.prepare("trainer", "engine")
        with pytest.raises(LaunchError, match=r"(?s)could not import unfit.*built for another processor"):
            run.wait_until(lambda: False, what="nothing", timeout_s=60)


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {HERE!r})
from pathlib import Path
from megatron_dgrpo.launch.supervisor import Supervisor
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
with Supervisor({str(tmp_path)!r}, preload={NO_IMPORTS}) as run:
    run.start_ranks("test_supervisor:rank", {{"folder": {str(tmp_path)!r}, "does": "return"}}, world_size=2)
    run.watch()
Path({str(tmp_path / "ended")!r}).touch()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "ended").exists()


# ---- signals to the supervisor ----


@pytest.fixture
def supervise_elsewhere(tmp_path):
    processes = []

    def begin(ranks: str, *, grace_s: float = 10.0, preload: bool = False) -> subprocess.Popen:
        call = {"folder": str(tmp_path), "ranks": ranks, "grace_s": grace_s, "preload": preload}
        code = f"import sys; sys.path.insert(0, {HERE!r}); import test_supervisor; test_supervisor.supervise(**{call})"
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen([sys.executable, "-c", code], **pipe, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_nothing(tmp_path, supervise_elsewhere, number, status):
    process = supervise_elsewhere("wait")
    wait_for_all(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "rank 0 of 2 with 3 threads" in output
    assert_nothing_is_left(tmp_path, *published(tmp_path / "private"))


def test_what_does_not_stop_is_killed_after_the_grace_and_says_where_it_was(tmp_path, supervise_elsewhere):
    process = supervise_elsewhere("deaf", grace_s=1.0)
    wait_for_all(tmp_path, "deaf0", "deaf1")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert_nothing_is_left(tmp_path, *published(tmp_path / "private"))
    assert "in rank" in (tmp_path / "logs" / "rank1.log").read_text()


def test_a_second_signal_skips_the_grace(tmp_path, supervise_elsewhere):
    process = supervise_elsewhere("deaf", grace_s=300.0)
    wait_for_all(tmp_path, "deaf0", "deaf1")
    process.send_signal(signal.SIGINT)
    (engine, _) = published(tmp_path / "engine")
    assert eventually(lambda: gone(engine)), "the first signal stops what listens to SIGTERM"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert_nothing_is_left(tmp_path, *published(tmp_path / "private"))


def test_sigkill_leaves_nothing_even_inside_a_collective(tmp_path, supervise_elsewhere):
    process = supervise_elsewhere("reduce", preload=True)
    assert [published(tmp_path / f"sum{r}") for r in (0, 1)] == [[3.0, 3.0]] * 2
    private_dir, shm_prefix = published(tmp_path / "private")
    assert Path(private_dir, "engine.sock").exists() and Path(f"/dev/shm/{shm_prefix}weights").exists()
    process.kill()
    process.communicate(timeout=60)
    assert_nothing_is_left(tmp_path, private_dir, shm_prefix)


def test_nothing_here_imports_torch():
    code = "import megatron_dgrpo.launch.supervisor, megatron_dgrpo.testing, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

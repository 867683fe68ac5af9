"""One supervisor per node owns every process of a run there: it starts them, watches them, and they die with it.

A run ends in one of three ways, and none leaves a process, a private file or shared memory behind:

- the ranks end well: engines are told to stop, then everything is closed;
- a process ends when it should not, and is not one that is started again (keeper.py): the others get a moment to fail
  of it, the *first* cause is found, everything is stopped, and the error names that process, how it ended and its last
  words;
- a signal: the first one (Ctrl-C, SIGTERM, SIGHUP), or a time limit that is near, raises here. Where updates are not
  saved yet the ranks are asked to save and end (requests.py) and given time for it; then comes an orderly stop
  (SIGTERM, a grace, SIGKILL); a second one skips both graces. SIGKILL of the supervisor itself is answered by the
  nurseries' servers (nursery_server.py).

The supervisor imports no torch: it must stay small and able to act while its processes hang.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch import nursery
from megatron_dgrpo.launch.keeper import Keeper, Kept
from megatron_dgrpo.launch.nursery import Child, Nursery
from megatron_dgrpo.launch.requests import ENDED_EARLY, NUDGE, Requests
from megatron_dgrpo.launch.watchdog import Watchdog
from megatron_dgrpo.launch.watched import Kind, Watched, hint, how_early
from megatron_dgrpo.observe import progress
from megatron_dgrpo.observe.screen import Screen
from megatron_dgrpo.rollout.control import Listener

PRELOAD: Mapping[Kind, Sequence[str]] = {"trainer": nursery.TRAINER_PRELOAD, "engine": nursery.ENGINE_PRELOAD}
_ENV: dict[Kind, dict[str, str]] = {"trainer": {}, "engine": nursery.ENGINE_ENV}
_SETTLE_S = 1.5
"""After an unexpected end, how long others may take to end of it: the first cause is looked for among all of them."""
_LONGEST_PRIVATE_PATH = 60
"""A Unix socket's whole path may have 107 bytes."""


class Supervisor:
    """Use as a context manager, in the main thread (it takes over SIGINT, SIGTERM and SIGHUP while it lives).

    `private_dir` (mode 0700, a short path) is for sockets; names in /dev/shm that begin with `shm_prefix` are removed
    at the end; `key` is the run's secret for its own sockets. They reach processes in their arguments, never by the
    environment. What the process named `echo` writes to its log is shown on standard output, with how far the run is.
    SIGUSR1 asks the ranks to save and go on; `saving_s` is what saving may take before the run ends of a signal, or of
    `ends_at` (time.monotonic()). A rank 0 without a sign of life for `stall_s` ends the run.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        echo: str | None = "rank0",
        grace_s: float = 10.0,
        saving_s: float = 0.0,
        ends_at: float | None = None,
        stall_s: float | None = None,
        preload: Mapping[Kind, Sequence[str]] = PRELOAD,
    ) -> None:
        self.log_dir = Path(run_dir).absolute() / "logs"
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.key = secrets.token_hex(32)
        self.shm_prefix = f"dgrpo-{secrets.token_hex(6)}-"
        self.processes: list[Watched] = []
        self._grace_s, self._preload = grace_s, preload
        self._saving_s, self._ends_at, self._stall_s = saving_s, ends_at, stall_s
        self._save_asked = False
        self._nurseries: dict[Kind, Nursery] = {}
        self._worlds = 0
        self._keeper = Keeper(self.say)
        self._control: Listener | None = None
        self._echo = echo
        self._screen: Screen | None = None
        self._stopping = self._stopped = self._hurry = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Supervisor:
        short = len(tempfile.gettempdir()) <= _LONGEST_PRIVATE_PATH
        self.private_dir = Path(tempfile.mkdtemp(prefix="dgrpo-", dir=None if short else "/tmp"))
        self._requests = Requests(self.private_dir)
        board = self.private_dir / "board-rank0.json"
        self._watchdog = Watchdog(self._nurseries.values, board, self._stall_s)
        if self._echo:
            self._screen = Screen(
                self.log_dir.parent,
                self.log_dir / f"{self._echo}.log",
                lambda: list(self.private_dir.glob("board-*.json")),
                hidden=nursery.NOISE.match,
            )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit) and not self._stopped:
            self._let_save()
        self.stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save_asked = True
        elif self._stopping:
            self._hurry = True
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    # ---- starting ----

    def prepare(self, *kinds: Kind) -> None:
        """Begin the imports of these kinds of processes, beside each other and beside whatever the caller does next."""
        for kind in kinds:
            if kind not in self._nurseries:
                self._nurseries[kind] = Nursery(
                    self._preload[kind],
                    log_path=self.log_dir / f"{kind}_server.log",
                    env=_ENV[kind],
                    private_dir=self.private_dir,
                    shm_prefix=self.shm_prefix,
                )

    def start_ranks(
        self,
        target: str,
        args: Mapping[str, Any],
        *,
        world_size: int,
        threads: int = 1,
        env: Mapping[str, str] | None = None,
    ) -> list[Child]:
        """Start trainer ranks `rank0`, `rank1`, ... that run `target` ("module:function") with arguments `args`.

        Each finds RANK, WORLD_SIZE, LOCAL_RANK in its environment and joins the others by `rendezvous.join_world`.
        """
        self.prepare("trainer")
        meeting = self.private_dir / f"world{self._worlds}"
        self._worlds += 1
        meeting.mkdir(mode=0o700)
        shared = {"WORLD_SIZE": str(world_size), "DGRPO_RENDEZVOUS": str(meeting), "OMP_NUM_THREADS": str(threads)}
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            shared["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo binds to what the host name resolves to
        ranks = []
        for rank in range(world_size):
            its_env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})}
            ranks.append(self._start("trainer", f"rank{rank}", target, args, its_env))
        return ranks

    def run_check(self, target: str, args: Mapping[str, Any], *, timeout_s: float) -> None:
        """Run something that is quick in a process with the trainers' imports, and wait for its end."""
        child = self._start("trainer", "checks", target, args, {})
        self.wait_until(lambda: child.returncode is not None, what="The checks had not ended", timeout_s=timeout_s)
        self.processes = [process for process in self.processes if process.child is not child]

    def say(self, words: str) -> None:
        """Onto standard output, without disturbing what is shown there."""
        if self._screen:
            self._screen.say(words)

    def start_engine(
        self,
        name: str,
        target: str,
        args: Mapping[str, Any],
        *,
        threads: int = 1,
        env: Mapping[str, str] | None = None,
        socket: Path | None = None,
        max_restarts: int = 0,
    ) -> Child:
        """Start an engine host; it must not end before it is told to. With the path of its `socket`, one that served
        and ends is started again."""
        its_env = {"OMP_NUM_THREADS": str(threads), **(env or {})}
        child = self._start("engine", name, target, args, its_env)
        if socket is not None:

            def again() -> Child:
                return self._start("engine", name, target, args, its_env)

            self._keeper.keep(Kept(child, again, socket, max_restarts))
        return child

    def listen(self) -> str:
        """The address at which rank 0 can have an engine host ended and started again (rollout/control.py)."""
        address = f"unix:{self.private_dir / 'control.sock'}"
        if self._control is None:
            self._control = Listener(address, self.key, self._keeper.discard)
        return address

    def _start(self, kind: Kind, name: str, target: str, args: Mapping[str, Any], env: Mapping[str, str]) -> Child:
        self.prepare(kind)
        if name in (self._echo, "checks"):
            env = {**env, progress.VARIABLE: str(self.private_dir / f"board-{name}.json")}
        child = self._nurseries[kind].start(name, target, args, env=env, log_path=self.log_dir / f"{name}.log")
        self.processes.append(Watched(child, kind))
        return child

    # ---- watching ----

    def watch(self) -> None:
        """Return when every rank has ended well; raise LaunchError when any process ends otherwise."""
        self._watch_while(lambda: any(p.may_end and p.child.returncode is None for p in self.processes), None, "")

    def wait_until(self, condition: Callable[[], bool], *, what: str, timeout_s: float) -> None:
        """Watch until `condition()` holds; `what` completes the sentence "the engine was not ready after ..."."""
        self._watch_while(lambda: not condition(), timeout_s, what)

    def _watch_while(self, goes_on: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        start = time.monotonic()
        while True:
            self._look()
            if self._control:
                self._control.attend()
            if self._save_asked:
                self._save_asked = False
                self._ask(end=False)
            if self._ends_at is not None and time.monotonic() >= self._ends_at:
                self.say("the time limit is near: the run saves and ends")
                raise SystemExit(ENDED_EARLY)
            over = any(p.kind == "trainer" and p.child.returncode is not None for p in self.processes)
            replaced = self._keeper.tend(over=over)
            self.processes = [process for process in self.processes if process.child not in replaced]
            if problem := self._watchdog.problem():
                self._end_what_hangs(f"{problem}; the run is stopped.")
            if self._fatal() or not all(n.alive for n in self._nurseries.values()):
                self._fail()
            if not goes_on():
                return
            if timeout_s is not None and time.monotonic() - start > timeout_s:
                self._end_what_hangs(f"{what} after {timeout_s:g} s.")

    def _end_what_hangs(self, title: str) -> NoReturn:
        running = [process.child for process in self.processes if process.child.returncode is None]
        self._ask_for_stacks(running)
        words = [f"{child.name}'s last words:\n{child.last_words()}" for child in running]
        self.stop()
        raise LaunchError("\n".join([title, *words]))

    def _look(self, timeout_s: float = 0.1) -> None:
        """Take in what happened, waiting a little for something to happen."""
        sockets = [server for server in self._nurseries.values() if server.alive]
        ready, _, _ = select.select(sockets, [], [], timeout_s)
        for server in ready:
            server.drain()
        if self._screen:
            self._screen.tick()

    def _failed(self) -> list[Watched]:
        """Who ended when it should not have. Engine hosts end with their last owner: when the first rank is done."""
        over = any(p.kind == "trainer" and p.child.returncode == 0 for p in self.processes)
        return [p for p in self.processes if p.failed and not (over and p.child.returncode == 0)]

    def _fatal(self) -> list[Watched]:
        """Whose end is the run's: of those that are not started again."""
        return [process for process in self._failed() if not self._keeper.revives(process.child)]

    def _fail(self) -> None:
        """Raise the first cause; return if, a moment later, nothing has failed after all."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and any(p.child.returncode is None for p in self.processes):
            self._look()
        ended = sorted(self._failed(), key=how_early)
        dead_servers = [server for server in self._nurseries.values() if not server.alive]
        if not self._fatal() and not dead_servers:
            return
        self.stop()
        if dead_servers:
            raise LaunchError("\n".join(server.obituary() for server in dead_servers))
        first, *rest = ended
        parts = [f"{first.describe()}; the run is stopped.{self._keeper.history(first.child)}{hint(first.child)}"]
        if rest:
            parts.append(f"After it: {', '.join(process.describe() for process in rest)}.")
        words = first.child.last_words() or "(nothing)"
        raise LaunchError("\n".join([*parts, f"Its last words ({first.child.log_path}):", words]))

    # ---- ending ----

    def _ask(self, *, end: bool) -> None:
        self._requests.ask(end=end)
        for process in self.processes:
            if process.child.name == "rank0":
                process.child.kill(NUDGE)

    def _let_save(self) -> None:
        """Have the ranks save and end, where they hold what no checkpoint has."""
        self._stopping = True
        if not self._requests.unsaved:
            return
        self._ask(end=True)
        deadline = time.monotonic() + self._saving_s
        ranks = [process for process in self.processes if process.may_end]
        while any(rank.child.returncode is None for rank in ranks) and not any(rank.failed for rank in ranks):
            if self._hurry or time.monotonic() >= deadline:
                self.say("the run did not save in time" if not self._hurry else "the run ends without saving")
                return
            self._look()
            if self._control:
                self._control.attend()

    def stop(self) -> None:
        """End every process: SIGTERM, the grace, SIGKILL; then remove what is private to the run."""
        if self._stopped:
            return
        self._stopping = True
        running = [process.child for process in self.processes if process.child.returncode is None]
        for child in running:
            child.kill(signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        while any(child.returncode is None for child in running) and time.monotonic() < deadline and not self._hurry:
            self._look()
        self._ask_for_stacks([child for child in running if child.returncode is None])
        for server in self._nurseries.values():
            server.close(hangs=Watchdog.hangs(server))
        if self._control:
            self._control.close()
        if self._screen:
            self._screen.close()
        for path in glob.glob(f"/dev/shm/{self.shm_prefix}*"):  # the servers did so; there may have been none
            with contextlib.suppress(OSError):
                os.unlink(path)
        shutil.rmtree(self.private_dir, ignore_errors=True)
        self._stopped = True
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @staticmethod
    def _ask_for_stacks(hanging: list[Child]) -> None:
        """Make processes write into their logs where they are."""
        for child in hanging:
            child.kill(signal.SIGUSR1)
        if hanging:
            time.sleep(0.3)

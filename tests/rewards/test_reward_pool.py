"""Workers: what hangs, raises, dies or floods costs its own sample, and nothing outlives the owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards import pool as pool_module
from megatron_dgrpo.rewards.base import Failure, Sample
from megatron_dgrpo.rewards.checks import reward_problems
from megatron_dgrpo.rewards.pool import RewardPool

USERS = """
import os, time, sys, threading
def reward(text, *, answer, prompt, fields):
    if text == "hang": time.sleep(1e9)
    if text == "stubborn":
        while True:
            try: time.sleep(1e9)
            except BaseException: pass
    if text == "raise": raise KeyError("no such key")
    if text == "exit": sys.exit(0)
    if text == "die": os._exit(3)
    if text == "crash": os.kill(os.getpid(), 11)
    if text == "nan": return float("nan")
    if text == "text": return "1.0"
    if text == "none": return None
    if text == "huge": return 10**400
    if text == "odd": return type("Odd", (), {"__float__": lambda self: 1 / 0})()
    if text == "flood":
        for _ in range(20_000): print("x" * 100)
    if text == "thread": threading.Thread(target=time.sleep, args=(1e9,)).start()
    if text == "alarm":
        import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(1)
    if text == "deaf":
        for number in (1, 2):
            try: os.close(number)
            except OSError: pass
    return len(text) + fields.get("bonus", 0) + (prompt == "p" and answer == "a")
async def slow(text, *, answer, prompt, fields): return 1.0
def other(text): return 1.0
"""


@pytest.fixture(scope="module", autouse=True)
def users_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_rewards.py").write_text(USERS)
    (folder / "broken_rewards.py").write_text("import nothing_of_that_name\n")
    (folder / "dead_rewards.py").write_text("import os\nos._exit(7)\n")
    here = Path.cwd()
    os.chdir(folder)  # which is where the functions are looked for
    sys.path.insert(0, str(here))
    yield
    sys.path.remove(str(here))
    os.chdir(here)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    with RewardPool(2, log_dir=tmp_path_factory.mktemp("logs")) as pool:
        yield pool


def function(target: str = "my_rewards:reward", **changes: Any) -> settings.Function:
    return settings.Function(kind="function", function=target, **({"timeout_s": 0.5} | changes))


def samples(*texts: str) -> list[Sample]:
    return [Sample(f"r{i}", text, "p", "a", {"bonus": 10 * i}) for i, text in enumerate(texts)]


def values(found: Sequence[float | Failure]) -> list[Any]:
    return [value.why if isinstance(value, Failure) else value for value in found]


def test_several_rewards_in_order(pool: RewardPool) -> None:
    exact = settings.ExactMatch(kind="exact_match")
    texts = ["a", "bb", "a", "ccc"] * 50
    found = pool.score([exact, function()], samples(*texts))
    assert found[0] == [float(text == "a") for text in texts]
    assert found[1] == [len(text) + 10 * i + 1 for i, text in enumerate(texts)]
    assert all(type(value) is float for row in found for value in row)
    assert len(pool.pids) == 2 and os.getpid() not in pool.pids
    assert pool.score([exact], []) == [[]] and pool.score([], samples("a")) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hang", "it took more than 0.5 s"),
        ("stubborn", "it took more than 0.5 s, and its process was ended"),
        ("raise", "KeyError('no such key')"),
        ("exit", "SystemExit(0)"),
        ("die", "its process ended with status 3"),
        ("crash", "its process was killed by SIGSEGV"),
        ("nan", "it gave nan, which is no finite number"),
        ("text", "it gave '1.0', which is no finite number"),
        ("none", "it gave None, which is no finite number"),
        ("huge", "which is no finite number"),
        ("odd", "which is no finite number"),
    ],
)
def test_a_failure_is_that_of_its_sample_alone(pool: RewardPool, text: str, why: str) -> None:
    found = values(pool.score([function()], samples("a", text, "ccc"))[0])
    assert found[0] == 2.0 and found[2] == 24.0
    assert why in found[1]


@pytest.mark.parametrize("text", ["flood", "thread", "alarm", "deaf"])
def test_what_a_function_leaves_behind_harms_nobody(pool: RewardPool, text: str) -> None:
    for _ in range(2):
        assert values(pool.score([function()], samples(text, "bb"))[0]) == [len(text) + 1.0, 13.0]


def test_a_pattern_that_backtracks_without_end(pool: RewardPool) -> None:
    regex = settings.Regex(kind="regex", pattern=r"(x+x+)+y", timeout_s=0.5)
    found = values(pool.score([regex], samples("xxy", "x" * 60, "xxy"))[0])
    assert found == [1.0, "it took more than 0.5 s", 1.0]


def test_what_follows_a_marker(pool: RewardPool) -> None:
    thought = settings.ExactMatch(kind="exact_match", after="</think>")
    texts = ["<think>b</think>a", "a", "<think>a</think>b", "<think>a", "</think>b</think> a", "</think>"]
    assert pool.score([thought], samples(*texts))[0] == [1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("is_gone", [True, False], ids=["before it is given a task", "about then"])
def test_workers_that_are_killed_while_idle_are_replaced(pool: RewardPool, is_gone: bool) -> None:
    pool.score([function()], samples("a", "b"))
    first = pool.pids
    assert len(first) == 2
    for pid in first:
        os.kill(pid, signal.SIGKILL)
        if is_gone:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert values(pool.score([function()], samples("a", "bb"))[0]) == [2.0, 13.0]
    assert not set(first) & set(pool.pids)


def test_rewards_that_cannot_be_made(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match="reward function cannot be used: my_rewards:slow is asynchronous"):
        pool.score([function("my_rewards:slow")], samples("a"))
    assert values(pool.score([function()], samples("a"))[0]) == [2.0]  # and goes on
    monkeypatch.setattr(pool_module, "START_S", 5.0)
    named = [
        function(f"{name}", name=f"n{i}")
        for i, name in enumerate(
            ["my_rewards:nothing", "my_rewards:other", "broken_rewards:f", "dead_rewards:f", "my_rewards:reward"]
        )
    ]
    code = settings.Code(kind="code")
    found = reward_problems([*named, code], "stages.1", [("d:1", {"tests": []}), ("d:2", {}), ("d:3", {})])
    if "can't confine" in str(found):
        found = [problem for problem in found if "can't confine" not in problem]
    assert [problem.split(":")[0] for problem in found] == ["stages.1.rewards"] * 5
    assert "n0" in found[0] and "has no attribute 'nothing'" in found[0]
    assert "n1" in found[1] and "can't be called as function(text, answer=..., prompt=..., fields=...)" in found[1]
    assert "n2" in found[2] and "nothing_of_that_name" in found[2]
    assert "n3" in found[3] and "ended with status 7" in found[3]
    assert "code reads the field 'tests', which 2 rows lack (d:2 the first)" in found[4]


def test_rows_that_are_no_json_say_so(pool: RewardPool) -> None:
    odd = Sample("r0", "a", answer="b", fields={"when": object()})
    with pytest.raises(RewardError, match="reward function cannot be given r0's fields: <object"):
        pool.score([function()], [odd])
    assert values(pool.score([settings.ExactMatch(kind="exact_match")], [odd])[0]) == [0.0]  # it does not ask for them


OWNER = """
import sys, time
from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.pool import RewardPool
assert not {"torch", "vllm"} & set(sys.modules)
pool = RewardPool(2)
pool.score([settings.ExactMatch(kind="exact_match")], [Sample("r", "a")] * 64)
print(*pool.pids, flush=True)
code = "import time\\nwhile True: time.sleep(1)"
runs = settings.Code(kind="code", timeout_s=100, isolation="best_effort")
pool.score([runs], [Sample("r", code, fields={"tests": ["pass"]})] * 4)
"""


def test_workers_and_what_they_started_die_with_a_killed_owner() -> None:
    root = Path(pool_module.__file__).parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert pids

    def children() -> set[int]:
        return {child for pid in pids for child in _children(pid)}

    deadline = time.monotonic() + 60
    while len(children()) < len(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    family = {*pids, *children()}
    assert len(family) == 2 * len(pids), "each worker runs code"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    while (left := [pid for pid in family if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

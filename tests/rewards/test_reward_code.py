"""Code against unit tests: what passes, what does not, and what untrusted code cannot do to the machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.code import Code, code_of

NOTHING = ["pass"]


def score(code: str, tests: Any, **changes: Any) -> float:
    scorer = Code(settings.Code(kind="code", **({"timeout_s": 1.0} | changes)))
    return scorer.score(Sample("r", f"So:\n```python\n{code}\n```\nDone.", fields={"tests": tests}))


@pytest.fixture(scope="module", autouse=True)
def _confined() -> None:
    """A kernel without Landlock or seccomp refuses, which is what the reward promises there."""
    try:
        Code(settings.Code(kind="code")).problem()
    except RewardError as error:
        pytest.skip(str(error))


def test_code_is_what_a_fence_holds() -> None:
    assert code_of("```python\na\n```\n```text\nb\n```\n```py\nc\n```") == "c\n"
    assert code_of("```\na\n```") == "a\n" and code_of("a = 1") == "a = 1"
    assert code_of("```python\n\n```") is None and code_of(" ") is None


def test_asserts_and_input_output() -> None:
    double = "def double(x):\n    return 2 * x"
    assert score(double, ["assert double(1) == 2", "assert double(-1) == -2"]) == 1.0
    assert score(double, ["assert double(1) == 2", "assert double(1) == 3"]) == 0.0
    assert score(double, ["assert double(1) == 2", "assert double(1) == 3"], score="share") == 0.5
    assert score(double, "assert double(2) == 4") == 1.0
    assert score(double, ["assert double(1) == 2", "assert double(1) == 3"], max_tests=1) == 1.0
    program = "n = int(input())\nprint(n, end=' ')\nprint(2 * n)\n"
    assert score(program, [{"input": "3\n", "output": "3 6\n\n"}]) == 1.0
    assert score(program, [{"input": "3\n", "output": "3 6"}, {"input": "x", "output": ""}], score="share") == 0.5
    assert score("import sys; print(1); print(2, file=sys.stderr)", [{"input": "", "output": "1"}]) == 1.0
    assert score("def f(:", ["pass"]) == 0.0
    assert score("class A:\n    pass\nif __name__ == '__main__':\n    import json", ["A()", "json.dumps({})"]) == 1.0


def test_tests_that_are_none_are_a_failure() -> None:
    for bad in ([], None, 3, [""], [{"input": "1"}], [{"input": 1, "output": "1"}]):
        with pytest.raises(RewardError, match="'tests' is"):
            score("pass", bad)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_to_end_early_is_not_to_pass(code: str) -> None:
    assert score(code, NOTHING) == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1', timeout=1)",
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.setsid()",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.ptrace(16, os.getppid(), 0, 0) == 0",
    ],
)
def test_what_is_barred_raises(code: str) -> None:
    """Each would pass if it were possible: the test is that it is an OSError and nothing else that keeps it from it."""
    assert score(code, NOTHING) == 0.0
    indented = code.replace("\n", "\n    ")
    refusals = "(OSError, AssertionError, ValueError)"
    assert score(f"try:\n    {indented}\nexcept {refusals}:\n    pass\nelse:\n    1 / 0", NOTHING) == 1.0


def test_files_stay_in_the_folder_of_the_process(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("secret")
    assert score("open('a', 'w').write('x'); assert open('a').read() == 'x'", NOTHING) == 1.0
    for attempt in (f"open({str(kept)!r}, 'w')", f"open({str(kept)!r})", f"import os; os.remove({str(kept)!r})"):
        assert score(attempt, NOTHING) == 0.0
        assert score(f"try:\n    {attempt}\nexcept PermissionError:\n    pass\nelse:\n    1 / 0", NOTHING) == 1.0
    assert kept.read_text() == "secret"
    assert score("open('a', 'w').write('x' * 2**21)", NOTHING, file_bytes=2**20) == 0.0
    before = {name for name in os.listdir("/tmp") if name.startswith("dgrpo-code-")}
    assert score("import os; os.makedirs('a/b'); open('a/b/c', 'w')", NOTHING) == 1.0
    assert {name for name in os.listdir("/tmp") if name.startswith("dgrpo-code-")} <= before


def test_limits_of_time_memory_and_output() -> None:
    start = time.monotonic()
    assert score("while True:\n    pass", NOTHING) == 0.0
    assert score("import time\ntime.sleep(1e9)", NOTHING) == 0.0
    assert score("try:\n    while True: pass\nexcept BaseException:\n    pass", NOTHING) == 0.0
    assert score("import time\ntime.sleep(0.1)", NOTHING) == 1.0
    assert score("x = bytearray(2**27)", NOTHING) == 1.0
    assert score("x = bytearray(2**30)", NOTHING) == 0.0
    assert score("x = []\nwhile True: x.append('x' * 10**6)", NOTHING) == 0.0
    assert score("while True: print('x' * 10**5)", NOTHING) == 0.0
    assert score("print('x' * 1000)", [{"input": "", "output": "x" * 1000}], output_bytes=1000) == 0.0
    assert score("print('x' * 900)", [{"input": "", "output": "x" * 900}], output_bytes=1000) == 1.0
    assert score("import threading\nt = threading.Thread(target=print)\nt.start(); t.join()", NOTHING) == 1.0
    assert time.monotonic() - start < 60


def test_a_machine_that_cannot_confine_is_a_failure_unless_best_effort(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A copy of the script that finds no Landlock: as on a kernel without it."""
    from megatron_dgrpo.rewards import code

    script = tmp_path / "confined.py"
    script.write_text(
        Path(code._SCRIPT)
        .read_text()
        .replace("_CREATE_RULESET, _ADD_RULE", "_NO, _ADD_RULE", 1)
        .replace("_libc.syscall(_CREATE_RULESET", "_libc.syscall(9999")
    )
    monkeypatch.setattr(code, "_SCRIPT", str(script))
    with pytest.raises(RewardError, match=r"can't confine code \(it has .*seccomp; landlock and seccomp are needed\)"):
        score("pass", NOTHING)
    assert score("pass", NOTHING, isolation="best_effort") == 1.0

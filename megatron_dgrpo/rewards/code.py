"""Code in a response against unit tests, each in a fresh process that confines itself (`confined.py`).

A test that is not passed for any reason of the code's (wrong, too slow, too much memory or output, a forbidden call) is
a test that is not passed. What the machine lacks, and tests that are no tests, are failures of the reward.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample

_PYTHON_FENCE = re.compile(
    r"^```(?:python|py|python3)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL | re.IGNORECASE
)
_ANY_FENCE = re.compile(r"^```[\w+-]*[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_SCRIPT = str(Path(__file__).with_name("confined.py"))
_START_S = 30.0
"""For the interpreter's start, which is not the code's fault; the test's clock runs from there."""
_REPORT_BYTES = 4096


class Code:
    def __init__(self, config: settings.Code) -> None:
        self._config = config

    def score(self, sample: Sample) -> float:
        tests = self._tests(sample)
        code = code_of(sample.text)
        if code is None:
            return 0.0
        passed = 0
        for test in tests:
            good = self._passes(code, test)
            if not good and self._config.score == "all":
                return 0.0
            passed += good
        return passed / len(tests)

    def problem(self) -> None:
        """RewardError if the machine can't confine code as it is asked to."""
        if not self._passes("", "pass"):
            raise RewardError("a test that does nothing does not pass: is memory_bytes or timeout_s too small?")

    def _tests(self, sample: Sample) -> list[str | Mapping[str, str]]:
        name = self._config.tests
        value = sample.field_of(name)
        tests = [value] if isinstance(value, str) else value
        good = isinstance(tests, list) and len(tests) > 0
        for test in tests if good else []:
            pair = isinstance(test, dict) and all(isinstance(test.get(key), str) for key in ("input", "output"))
            good = good and (pair or (isinstance(test, str) and test.strip() != ""))
        if not good:
            raise RewardError(
                f"the row's field {name!r} is {value!r:.80}: it must list {{input, output}}, or Python code"
            )
        return tests[: self._config.max_tests]

    def _passes(self, code: str, test: str | Mapping[str, str]) -> bool:
        inline = test if isinstance(test, str) else None
        given, wanted = ("", None) if isinstance(test, str) else (test["input"], test["output"])
        token = secrets.token_hex(16)
        limits = {key: getattr(self._config, key) for key in ("memory_bytes", "file_bytes")}
        request = {
            "code": code,
            "test": inline,
            "token": token,
            "limits": limits | {"seconds": self._config.timeout_s + 1.0},
            "required": self._config.isolation == "required",
        }
        ran = _run(request, given, self._config.timeout_s, self._config.output_bytes)
        barred, _, verdict = ran.report.partition("\n")
        if not ran.report:
            raise RewardError(f"a process for the tests did not start: {ran.output.decode(errors='replace')[-300:]!r}")
        if request["required"] and not {"landlock", "seccomp"} <= set(barred.split()):
            raise RewardError(
                f"this machine can't confine code (it has {barred or 'nothing'}; landlock and seccomp are needed): use "
                "another kernel or container profile, or set isolation=best_effort where the responses are trusted"
            )
        if ran.overtime or ran.flooded or verdict != token:
            return False
        return wanted is None or _lines(ran.output.decode(errors="replace")) == _lines(wanted)


def code_of(text: str) -> str | None:
    """The last block fenced as Python, else the last fenced one, else the whole text; None where there is nothing."""
    for fence in (_PYTHON_FENCE, _ANY_FENCE):
        if blocks := fence.findall(text):
            return blocks[-1] if blocks[-1].strip() else None
    return text if text.strip() else None


def _lines(text: str) -> list[str]:
    """What a judge of programs compares: white space at the ends of lines, and of the whole, apart."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


class _Ran:
    report = ""
    output = b""
    overtime = flooded = False


def _run(request: dict[str, Any], given: str, seconds: float, output_bytes: int) -> _Ran:
    """One process, from its start to the end of its group, with bounded time and output."""
    ran = _Ran()
    with (
        tempfile.TemporaryDirectory(prefix="dgrpo-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as stdin,
    ):
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        stdin.write(given.encode(errors="surrogatepass"))
        stdin.seek(0)
        report_end, report_write = os.pipe()
        with open(report_end, "rb", buffering=0) as report, open(report_write, "wb", buffering=0) as theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", _SCRIPT, str(asked.fileno()), str(theirs.fileno()), str(os.getpid())],
                pass_fds=(asked.fileno(), theirs.fileno()),
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **_ONE_THREAD},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if request["test"] is not None else subprocess.DEVNULL,
                start_new_session=True,
            )
            theirs.close()
            try:
                _listen(process, report, ran, seconds, output_bytes)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
    return ran


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _listen(process: subprocess.Popen[bytes], report: Any, ran: _Ran, seconds: float, output_bytes: int) -> None:
    """Until both ends are closed, which is when the process is gone: it can't start another that would hold them."""
    assert process.stdout is not None
    output, told = bytearray(), bytearray()
    deadline, begun = time.monotonic() + _START_S, False
    pipes = {process.stdout.fileno(): output, report.fileno(): told}
    while pipes and not ran.flooded:
        left = deadline - time.monotonic()
        if left <= 0:
            ran.overtime = True
            break
        for pipe in select.select(list(pipes), [], [], left)[0]:
            if data := os.read(pipe, 1 << 16):
                pipes[pipe] += data
            else:
                del pipes[pipe]
        if told and not begun:
            deadline, begun = time.monotonic() + seconds, True
        ran.flooded = len(output) > output_bytes or len(told) > _REPORT_BYTES
    ran.output, ran.report = bytes(output), told.decode(errors="replace")

"""A report that is killed while it is written leaves the old one, whole, or the new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dgrpo.points.plan import AFTER, HALF, Fault
from megatron_dgrpo.testing.faults import plan

OLD = "<p>an old one</p>"


@pytest.mark.parametrize(
    ("fault", "new"),
    [
        (Fault("report.new", "kill", HALF), False),
        (Fault("report.name", "kill"), False),
        (Fault("report.name", "kill", AFTER), True),
    ],
)
def test_a_report_is_the_old_one_or_the_new_one(fault: Fault, new: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"stage": "sft", "stage_number": 0, "step": 1, "loss": 1.0}\n')
    target = run / "report.html"
    target.write_text(OLD)
    env = {**os.environ, **plan(tmp_path / "plan", fault), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "megatron_dgrpo.cli", "report", str(run)]
    assert subprocess.run(command, env=env, capture_output=True, timeout=100).returncode == -signal.SIGKILL
    text = target.read_text()
    assert (text != OLD) == new and (not new or text.rstrip().endswith("</html>"))

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_dgrpo.errors import DataError
from megatron_dgrpo.observe.metrics import MetricsWriter, read_metrics
from megatron_dgrpo.points.plan import AFTER, BEFORE, Fault
from megatron_dgrpo.testing.faults import plan


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write({"stage": "dgrpo", "step": 1, "loss": 0.25, "done": False, "note": "é\n", "none": None})
    assert len(read_metrics(writer.path).records) == 1, "a line is there as soon as it is written"
    writer.write({"step": np.int64(2), "loss": np.float32(0.5)})
    writer.close()
    metrics = read_metrics(writer.path)
    assert not metrics.torn
    assert metrics.records[0] == {"stage": "dgrpo", "step": 1, "loss": 0.25, "done": False, "note": "é\n", "none": None}
    assert metrics.series("loss") == [0.25, 0.5] and metrics.series("stage") == ["dgrpo"]


def test_numbers_that_are_not_finite_are_written_as_such(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m")
    writer.write({"a": math.nan, "b": math.inf, "c": np.float64("-inf")})
    line = writer.path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (record,) = read_metrics(writer.path).records
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_what_no_number_is_made_of(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m")
    with pytest.raises(TypeError, match="metric loss is a dict"):
        writer.write({"step": 1, "loss": {}})
    assert writer.path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}', b"x" * 200_000])
def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    metrics = read_metrics(path)
    assert metrics.torn and metrics.series("step") == [1, 2]
    writer = MetricsWriter(path)
    assert writer.torn_bytes == len(torn)
    writer.write({"step": 3})
    metrics = read_metrics(path)
    assert not metrics.torn and metrics.series("step") == [1, 2, 3]


def test_a_file_that_is_one_torn_line(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"y" * 70_000)
    assert MetricsWriter(tmp_path / "m").torn_bytes == 70_000
    assert (tmp_path / "m").read_bytes() == b""


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b'{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 of .* is damaged"):
        read_metrics(tmp_path / "m")
    with pytest.raises(DataError, match="can't be read"):
        read_metrics(tmp_path / "none")


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    """Whatever the moment of the kill, all lines but the last are whole, and another writer goes on."""
    program = (
        "import sys; from megatron_dgrpo.observe.metrics import MetricsWriter; w = MetricsWriter(sys.argv[1])\n"
        "for step in range(10**9): w.write({'step': step, 'text': 'x' * 5000})"
    )
    path, whole = tmp_path / "m", 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 60
        before = path.stat().st_size if path.exists() else 0
        while (not path.exists() or path.stat().st_size < before + 500_000) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        steps = read_metrics(path).series("step")
        assert len(steps) > whole
        whole = len(steps)


@pytest.mark.parametrize("moment", [BEFORE, AFTER])
def test_a_kill_while_a_torn_line_is_cut_off_loses_no_whole_one(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    env = {**os.environ, **plan(tmp_path / "plan", Fault("metrics.torn", "kill", moment))}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = "import sys; from megatron_dgrpo.observe.metrics import MetricsWriter; MetricsWriter(sys.argv[1])"
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env=env, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    writer = MetricsWriter(path)
    assert (writer.torn_bytes > 0) == (moment == BEFORE)
    writer.write({"step": 2})
    writer.close()
    assert [record["step"] for record in read_metrics(path).records] == [1, 2]

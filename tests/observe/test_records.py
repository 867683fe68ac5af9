from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from megatron_dgrpo.observe.console import Console
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.observe.records import Records
from megatron_dgrpo.observe.timers import Phases


def test_a_step_goes_to_the_file_and_to_the_console(tmp_path: Path) -> None:
    stream = io.StringIO()
    records = Records(tmp_path, Console(stream))
    phases = Phases()
    with phases("train"):
        time.sleep(0.06)
    records.report("dgrpo", 1, 2, 30, {"loss": 0.5, "tokens": 600.0}, phases=phases, update=1)
    records.report("dgrpo", 1, 2, 30, {"loss": 0.25}, update=2)
    records.note("exported")
    records.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl").records
    assert {"stage": "dgrpo", "stage_number": 1, "step": 2, "update": 1, "loss": 0.5}.items() <= first.items()
    assert 0.06 <= first["time/train"] <= first["time/step"] < 5
    assert first["tokens_per_s"] == pytest.approx(600 / first["time/step"])
    assert second["update"] == 2 and "time/step" not in second and "tokens_per_s" not in second
    assert abs(second["time"] - time.time()) < 60
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("dgrpo  2/30  loss  0.5000") and "(train 0.1s)" in lines[0] and lines[1:] == ["exported"]


def test_a_torn_line_of_an_earlier_run_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    stream = io.StringIO()
    Records(tmp_path, Console(stream)).report("sft", 0, 2, 2, {"loss": 1.0})
    assert "cut 4 bytes" in stream.getvalue()
    assert read_metrics(tmp_path / "metrics.jsonl").series("step") == [1, 2]

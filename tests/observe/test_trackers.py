from __future__ import annotations

import importlib.util
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.trackers import MLflow, TensorBoard, WandB, missing_packages
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.observe.events import read_events
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.observe.records import Records
from megatron_dgrpo.observe.tensorboard import EventFile, crc32c, masked_crc
from megatron_dgrpo.observe.trackers import Tracker, figures, trackers

RECORD = {"loss": 0.5, "row/kl@1024": 1.25, "bad": float("nan"), "text": "x", "none": None, "tokens": 7}
FIGURES = {"loss": 0.5, "row/kl@1024": 1.25, "tokens": 7.0}


def needs(package: str) -> Any:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed (extra 'tracking')")


def two_steps(folder: Path, settings: Any) -> None:
    """Two stages' steps through the records, as rank 0 makes them."""
    records = Records(folder, trackers=trackers((settings,), folder, {"seed": 3}), steps=[10, 20])
    records.report("sft", 0, 10, 10, RECORD)
    records.report("dgrpo", 1, 2, 20, RECORD | {"loss": 0.25})
    records.close()


def test_figures_are_the_finite_numbers() -> None:
    assert figures(RECORD | {"time": 1.0, "stage": "sft", "stage_number": 0, "step": 3, "update": 1}) == FIGURES


# ---- TensorBoard ----


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(bytes(range(32))) == 0x46DD794E


def events_of(path: Path) -> list[Any]:
    """An event file by the protocol's own description, with protobuf's reader and this test's framing."""
    message = event_class()
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12])[0] == masked_crc(content[:8])
        data = content[12 : 12 + length]
        assert struct.unpack("<I", content[12 + length : 16 + length])[0] == masked_crc(data)
        found.append(message.FromString(data))
        content = content[16 + length :]
    return found


def event_class() -> Any:
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2", reason="protobuf is not installed")
    from google.protobuf import descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str]) -> None:
        found = file.message_type.add(name=name)
        for field, number, kind, type_name in fields:
            repeated = kinds.LABEL_REPEATED if field == "value" else kinds.LABEL_OPTIONAL
            found.field.add(name=field, number=number, type=kind, type_name=type_name or None, label=repeated)

    message("Value", ("tag", 1, kinds.TYPE_STRING, ""), ("simple_value", 2, kinds.TYPE_FLOAT, ""))
    message("Summary", ("value", 1, kinds.TYPE_MESSAGE, ".t.Value"))
    message(
        "Event",
        ("wall_time", 1, kinds.TYPE_DOUBLE, ""),
        ("step", 2, kinds.TYPE_INT64, ""),
        ("file_version", 3, kinds.TYPE_STRING, ""),
        ("summary", 5, kinds.TYPE_MESSAGE, ".t.Summary"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def test_an_event_file_holds_what_was_written(tmp_path: Path) -> None:
    two_steps(tmp_path, TensorBoard(kind="tensorboard"))
    (path,) = (tmp_path / "tensorboard").iterdir()
    first, *steps = events_of(path)
    assert first.file_version == "brain.Event:2"
    assert [event.step for event in steps] == [10, 12], "a later stage's steps come after the earlier ones'"
    assert {value.tag: value.simple_value for value in steps[0].summary.value} == FIGURES
    assert steps[1].summary.value[0].simple_value == 0.25 and abs(steps[1].wall_time - time.time()) < 60


def test_figures_beyond_a_float_are_its_largest(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.scalars(2**40, {"x": 1e300}, 1.0)
    file.close()
    _, event = events_of(file.path)
    assert event.step == 2**40 and event.summary.value[0].simple_value == pytest.approx(3.4028234e38)


@needs("tensorboard")
def test_tensorboard_reads_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_steps(tmp_path, TensorBoard(kind="tensorboard"))
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == set(FIGURES)
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(10, 0.5), (12, 0.25)]


# ---- the others ----


@needs("wandb")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    two_steps(tmp_path, WandB(kind="wandb", project="p", mode="offline"))
    assert read_events(tmp_path / "events.jsonl").records == []
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"row/kl@1024" in content and b"0.25" in content


@needs("mlflow")
def test_mlflow_in_a_file(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    two_steps(tmp_path / "run", MLflow(kind="mlflow", uri=uri))
    assert read_events(tmp_path / "run" / "events.jsonl").records == []
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("megatron-dgrpo").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(10, 0.5), (12, 0.25)]
    assert run.data.metrics["row/kl_from_1024"] == 1.25


def test_a_package_that_is_missing_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked = (TensorBoard(kind="tensorboard"), WandB(kind="wandb", project="p"), MLflow(kind="mlflow", uri="x"))
    first, second = missing_packages(asked)
    assert first.startswith("trackers.1: wandb is not installed") and "[tracking]" in first
    assert second.startswith("trackers.2: mlflow is not installed")


def test_an_unknown_tracker_is_said_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run_dir: x\ntrackers: [{kind: tensorbord}]\n")
    with pytest.raises(ConfigError, match="trackers.0.*tensorboard"):
        load(tmp_path / "c.yaml")


# ---- a tracker that fails, or is slow ----


class Odd:
    """Fails at its second record, or never comes back from its first."""

    def __init__(self, hold: threading.Event | None = None) -> None:
        self.hold, self.seen = hold, 0

    def log(self, step: int, values: Mapping[str, float], moment: float) -> None:
        self.seen += 1
        if self.hold is not None:
            self.hold.wait(60)
        elif self.seen == 2:
            raise ConnectionError("the server is gone")

    def close(self) -> None:
        raise AssertionError("closed after it failed")


def broken() -> Tracker:
    raise PermissionError("no key")


def test_a_tracker_that_fails_is_an_event_and_the_run_goes_on(tmp_path: Path) -> None:
    records = Records(tmp_path, trackers=[("wandb", broken), ("mlflow", Odd)])
    for step in range(1, 6):
        records.report("sft", 0, step, 5, {"loss": 1.0})
    records.close()
    words = sorted(event["words"] for event in read_events(tmp_path / "events.jsonl").records)
    assert len(words) == 2
    assert words[0].startswith("mlflow failed") and "the server is gone" in words[0]
    assert words[1].startswith("wandb failed") and "no key" in words[1]
    assert read_metrics(tmp_path / "metrics.jsonl").series("step") == [1, 2, 3, 4, 5]


def test_a_tracker_that_hangs_holds_no_step_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_dgrpo.observe import trackers as module

    monkeypatch.setattr(module, "_QUEUED", 10)
    monkeypatch.setattr(module, "_CLOSE_S", 0.2)
    hold = threading.Event()
    records = Records(tmp_path, trackers=[("mlflow", lambda: Odd(hold))])
    start = time.monotonic()
    for step in range(1, 101):
        records.report("sft", 0, step, 1000, {"loss": 1.0})
    records.close()
    assert time.monotonic() - start < 40
    hold.set()
    words = [event["words"] for event in read_events(tmp_path / "events.jsonl").records]
    assert any("was too slow for" in text for text in words) and any("had not sent" in text for text in words)

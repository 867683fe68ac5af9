"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, behind one small protocol.

A tracker must never hold a run up or end it: each has a thread of its own and a queue in front of it. What it raises
is told of once, and it is given up; what comes while its queue is full is counted, and told of at the end. It is made
in its thread, too: connecting to a server may take long.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_dgrpo.config.trackers import MLflow, TensorBoard, TrackerSettings, WandB
from megatron_dgrpo.observe.tensorboard import EventFile

_QUEUED = 1000
"""Steps that may wait for a slow tracker."""
_CLOSE_S = 30.0
"""How long the run's end waits for what has not been sent."""
_NO_FIGURES = ("time", "stage", "stage_number", "update", "step")


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float], moment: float) -> None:
        """The finite figures of one record."""

    def close(self) -> None:
        """Send what is left."""


def trackers(
    settings: tuple[TrackerSettings, ...], run_dir: str | Path, config: Mapping[str, Any]
) -> list[tuple[str, Callable[[], Tracker]]]:
    """What makes each of a config's trackers, with its name."""
    folder = Path(run_dir)

    def maker(one: TrackerSettings) -> Callable[[], Tracker]:
        match one:
            case TensorBoard():
                return lambda: _TensorBoard(folder / "tensorboard")
            case WandB():
                return lambda: _WandB(one, folder, config)
            case MLflow():
                return lambda: _MLflow(one, folder, config)

    return [(one.kind, maker(one)) for one in settings]


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._file = EventFile(folder)

    def log(self, step: int, values: Mapping[str, float], moment: float) -> None:
        self._file.scalars(step, values, moment)

    def close(self) -> None:
        self._file.close()


class _WandB:
    def __init__(self, settings: WandB, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or folder.name,
            mode=settings.mode,
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float], moment: float) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, settings: MLflow, folder: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=settings.uri)
        found = self._client.get_experiment_by_name(settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(settings.experiment)
        self._run = self._client.create_run(experiment, run_name=settings.name or folder.name).info.run_id
        self._client.log_dict(self._run, dict(config), "config.json")

    def log(self, step: int, values: Mapping[str, float], moment: float) -> None:
        # "@" is not among the characters that MLflow takes in a name
        figures = [self._metric(k.replace("@", "_from_"), v, int(moment * 1000), step) for k, v in values.items()]
        self._client.log_batch(self._run, metrics=figures)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Tracked:
    """A tracker behind its queue."""

    def __init__(self, name: str, make: Callable[[], Tracker], failed: Callable[[str], None]) -> None:
        self.name = name
        self._make, self._failed = make, failed
        self._queue: queue.Queue[tuple[int, dict[str, float], float] | None] = queue.Queue(_QUEUED)
        self._lost = 0
        self._gone = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Takes microseconds, whatever the tracker does."""
        if self._gone:
            return
        try:
            self._queue.put_nowait((step, figures(record), float(record.get("time", 0.0)) or time.time()))
        except queue.Full:
            self._lost += 1

    def close(self) -> None:
        deadline = time.monotonic() + _CLOSE_S
        try:
            self._queue.put(None, timeout=_CLOSE_S)
        except queue.Full:
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._failed(f"{self.name} had not sent all figures after {_CLOSE_S:g} s; metrics.jsonl has them")
        if self._lost:
            self._failed(f"{self.name} was too slow for {self._lost} records; metrics.jsonl has them")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (item := self._queue.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except Exception as error:  # whatever it is: a tracker is no reason to stop
            self._gone = True
            self._failed(
                f"{self.name} failed and gets no more figures ({type(error).__name__}: {error}); "
                "metrics.jsonl has all of them"
            )
            while not self._queue.empty():  # so that close need not wait
                self._queue.get_nowait()


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, by name."""
    found = {}
    for key, value in record.items():
        if key in _NO_FIGURES or value is None or isinstance(value, str):
            continue
        number = float(value)
        if math.isfinite(number):
            found[key] = number
    return found

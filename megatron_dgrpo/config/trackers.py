"""The trackers' sections of a config: where figures go beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from megatron_dgrpo.config.frozen import Frozen


class TensorBoard(Frozen):
    """Event files in RUN/tensorboard. Nothing needs to be installed to write them."""

    kind: Literal["tensorboard"]


class WandB(Frozen):
    """Weights & Biases (extra `tracking`)."""

    kind: Literal["wandb"]
    project: str
    """The project that the run belongs to."""
    entity: str | None = None
    """User or team; the account's own where none is given."""
    name: str | None = None
    """Of the run; the run folder's where none is given."""
    mode: Literal["online", "offline"] = "online"
    """offline: keep it in RUN/wandb, for `wandb sync`."""


class MLflow(Frozen):
    """MLflow (extra `tracking`)."""

    kind: Literal["mlflow"]
    uri: str
    """Address of the server, or a database such as sqlite:///mlflow.db."""
    experiment: str = "megatron-dgrpo"
    """The experiment that the run belongs to."""
    name: str | None = None
    """Of the run; the run folder's where none is given."""


TrackerSettings = Annotated[TensorBoard | WandB | MLflow, Field(discriminator="kind")]


def missing_packages(settings: Sequence[TensorBoard | WandB | MLflow]) -> Iterator[str]:
    """What a config asks for and this machine lacks."""
    for number, tracker in enumerate(settings):
        if tracker.kind != "tensorboard" and importlib.util.find_spec(tracker.kind) is None:
            yield (
                f"trackers.{number}: {tracker.kind} is not installed; install the extra 'tracking' "
                f"(pip install 'megatron-dgrpo[tracking]'), or remove this tracker"
            )

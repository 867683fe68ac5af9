"""`dgrpo checkpoints`: what the command does with a run's folder. Only exporting needs torch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from megatron_dgrpo.checkpoint.listing import named, show
from megatron_dgrpo.errors import CheckpointError, ConfigError
from megatron_dgrpo.launch.resume import locked


def checkpoints(run_dir: Path, verified: bool, keep: int | None, export: str | None, out: Path | None) -> int:
    """Returns the exit status: 1 where a checkpoint is not whole."""
    if (export is None) != (out is None):
        raise ConfigError("--export NAME and --out DIR go together: give both")
    if keep is not None and keep < 1:
        raise ConfigError(f"--prune {keep}: keep 1 or more; to remove all of them, remove the run's folder checkpoints")
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is no folder (looked from {Path.cwd()}): give the run_dir of a run")
    if export is not None and out is not None:
        from megatron_dgrpo.checkpoint.tools import convert_megatron_to_hf

        return convert_megatron_to_hf(["--megatron", str(named(run_dir, export)), "--out", str(out)])
    with locked(run_dir) if keep is not None else nullcontext():
        table, whole = show(run_dir, verified=verified, keep=keep)
    print(table)
    return 0 if whole else 1

"""`dgrpo report RUN`: the page, with samples of the run's journal as text. Imports no torch.

Texts are made of the ids that were sampled, by the student's tokenizer.json; without the tokenizers package, or that
file, the ids themselves are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.observe.report.page import write_report
from megatron_dgrpo.observe.report.rollouts import MAX_SHOWN, NONE, Rollout, Rollouts, evenly
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.rollout import journal

FOLDER = "rollouts"
_STEPS = 60
"""Steps whose files are read, spread over the run."""

Decode = Callable[[Sequence[int]], str]


def report(run_dir: Path, out: Path | None) -> Path:
    return write_report(run_dir, out, kept_rollouts(run_dir))


def kept_rollouts(run_dir: Path) -> Rollouts:
    """Samples of steps spread over the run: of each some of the least and of the greatest reward, and between."""
    folder = run_dir / FOLDER
    places = evenly(journal.steps(folder), _STEPS) if folder.is_dir() else []
    if not places:
        return NONE
    decode, note = _decoder(run_dir)
    items: list[Rollout] = []
    unread = 0
    for stage, step in places:
        try:
            trajectories = journal.read_step(folder, stage, step).trajectories
        except RolloutError:
            unread += 1
            continue
        trajectories.sort(key=lambda t: sum(t.rewards.values()))
        items += [_rollout(stage, step, t, decode) for t in evenly(trajectories, max(2, MAX_SHOWN // len(places)))]
    notes = [note, f"The rollouts of {unread} steps can't be read." if unread else ""]
    return Rollouts(items, " ".join(filter(None, notes)))


def _rollout(stage: int, step: int, trajectory: Trajectory, decode: Decode) -> Rollout:
    return Rollout(
        stage_number=stage,
        step=step,
        prompt=decode(trajectory.prompt_tokens.tolist()),
        response=decode(trajectory.response_tokens.tolist()),
        rewards=dict(trajectory.rewards),
        finish_reason=trajectory.finish_reason,
        num_tokens=len(trajectory.response_tokens),
        name=f"{trajectory.prompt_id}, sample {trajectory.sample}",
    )


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _decoder(run_dir: Path) -> tuple[Decode, str]:
    """Ids to text, and what there is to say about it."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return _ids, "Token ids are shown: the package tokenizers is not installed here."
    for folder in (run_dir / "hf", _student(run_dir)):
        if folder is not None and (folder / "tokenizer.json").is_file():
            found = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return partial(_text, found), ""
    return _ids, "Token ids are shown: the student's tokenizer.json is not where the run had it."


def _student(run_dir: Path) -> Path | None:
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return Path(config["models"][config["student"]]["path"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _ids(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))

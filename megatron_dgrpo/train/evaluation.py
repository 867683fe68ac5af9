"""Mean reward on held-out prompts, one sampled response each, the same seeds at every evaluation."""

from __future__ import annotations

import numpy as np

from megatron_dgrpo import points
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.train.collect import Asked, collect, reward_means, totals
from megatron_dgrpo.train.run import Run

EVALUATION_SEED = 7919
"""Held-out responses are drawn with seeds of their own, so that evaluating more or less often changes no training."""


def is_due(run: Run, stage: int, step: int) -> bool:
    """Before the first step, after the last one, and every so many between."""
    settings = run.config.evaluation
    if settings is None:
        return False
    last = run.config.stages[stage].steps
    return step in (0, last) or bool(settings.every and step % settings.every == 0)


def evaluate(run: Run, stage: int, step: int) -> float | None:
    """Returns the mean reward on rank 0; nothing where there is no evaluation."""
    settings = run.config.evaluation
    if settings is None:
        return None
    phases = Phases()
    with phases("sync"):
        run.sync(settings.engine)
    asked = Asked(
        settings.engine,
        run.heldout,
        settings.sampling,
        num_samples=1,
        rewards=settings.rewards,
        seed=EVALUATION_SEED,
        step=0,
        what="evaluate",
    )
    points.reached("evaluate")
    trajectories = collect(run, asked, phases)
    run.rest(settings.engine)
    if not trajectories:  # not rank 0, which reports
        return None
    rewards_B = totals(trajectories, settings.rewards)
    values = {
        "heldout/reward": float(rewards_B.mean()),
        "heldout/prompts": float(len(rewards_B)),
        "heldout/length": float(np.mean([t.num_loss_tokens for t in trajectories])),
        **reward_means([t.rewards for t in trajectories], "heldout"),
        **{f"heldout/{name}": count for name, count in run.reward_failures().items()},
    }
    run.report(stage, step, values, phases=phases)
    return values["heldout/reward"]

"""Prompts to scored trajectories, on every rank: rank 0 asks the engine and the rewards, the others wait in the
store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_dgrpo.config.schema import Reward, Sampling
from megatron_dgrpo.data.chat import prompt_ids
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.errors import RolloutError, listing
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.rewards.compose import Rewards
from megatron_dgrpo.rollout.messages import Completion, GenerateRequest, Shaping, sample_seed
from megatron_dgrpo.train.run import Run

_SCORING_S = 600.0
"""What the other ranks allow rank 0 for everything but starting and generating."""


def collect(
    run: Run,
    engine: str,
    rows: Sequence[PromptRow],
    *,
    sampling: Sampling,
    num_samples: int,
    rewards: Sequence[Reward],
    seed: int,
    step: int,
    phases: Phases,
    what: str = "generate",
) -> list[Trajectory]:
    """`num_samples` scored trajectories of each row, row by row."""
    settings = run.config.engines[engine]
    mine = None
    if run.engines is not None:
        requests = [_request(run, row, sampling, num_samples, seed, step) for row in rows]
        with phases("generate"):
            answers = run.engines.client(engine).generate(requests, deadline_s=settings.request_timeout_s)
            completions = list(run.board.over(answers, what, len(rows) * num_samples, "samples"))
        with phases("score"):
            mine = _score(run, rows, requests, completions, rewards, num_samples)
    with phases("generate"):
        return run.share_trajectories(mine, settings.start_timeout_s + settings.request_timeout_s + _SCORING_S)


def _request(run: Run, row: PromptRow, sampling: Sampling, num_samples: int, seed: int, step: int) -> GenerateRequest:
    return GenerateRequest(
        prompt_id=row.name,
        prompt_tokens=np.asarray(prompt_ids(run.tokenizer, row), np.int32),
        seeds=tuple(sample_seed(seed, step, row.name, sample) for sample in range(num_samples)),
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        stop_token_ids=run.tokenizer.eos_ids,
        shaping=Shaping(**sampling.shaping),  # type: ignore[arg-type]
    )


def _score(
    run: Run,
    rows: Sequence[PromptRow],
    requests: Sequence[GenerateRequest],
    completions: Sequence[Completion],
    rewards: Sequence[Reward],
    num_samples: int,
) -> list[Trajectory]:
    found = {(c.prompt_id, c.sample): c for c in completions}
    wanted = [(row.name, sample) for row in rows for sample in range(num_samples)]
    lost = [f"sample {sample} of prompt {name}" for name, sample in wanted if (name, sample) not in found]
    if lost or len(completions) != len(wanted):
        raise RolloutError(listing(f"{len(wanted)} samples were asked for and {len(completions)} came; missing:", lost))
    row_of = {row.name: row for row in rows}
    prompt_of = {request.prompt_id: request.prompt_tokens for request in requests}
    texts = [run.tokenizer.decode(found[key].tokens) for key in wanted]
    scores = Rewards(rewards).score([row_of[name] for name, _ in wanted], texts)
    return [
        _trajectory(found[key], prompt_of[key[0]], {name: values[i] for name, values in scores.items()})
        for i, key in enumerate(wanted)
    ]


def _trajectory(completion: Completion, prompt_tokens: np.ndarray, rewards: dict[str, float]) -> Trajectory:
    segment = Segment(
        tokens=completion.tokens,
        trained=True,
        behaviour_logprobs=completion.logprobs,
        weight_versions=completion.weight_versions,
    )
    return Trajectory(
        completion.prompt_id, completion.sample, prompt_tokens, (segment,), completion.finish_reason, rewards
    )


def totals(trajectories: Sequence[Trajectory], rewards: Sequence[Reward]) -> np.ndarray:
    """The weighted sum of each trajectory's rewards."""
    return np.asarray([Rewards(rewards).total(t.rewards) for t in trajectories], np.float64)

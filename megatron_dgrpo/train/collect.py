"""Prompts to scored groups. Rank 0 alone asks the engine and the rewards; `chunks` hands on to the others what it has.

A group is scored as soon as the last of its samples has ended, while the engine goes on with the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dgrpo.config.rewards import AnyReward
from megatron_dgrpo.config.schema import Sampling
from megatron_dgrpo.data.chat import prompt_ids
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.errors import RolloutError, listing
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.compose import total
from megatron_dgrpo.rollout.messages import (
    Chunk,
    Completion,
    GenerateRequest,
    Group,
    Response,
    Shaping,
    sample_seed,
)
from megatron_dgrpo.train.run import Run

_SCORING_S = 600.0
"""What the other ranks allow rank 0 for everything but starting and generating."""


@dataclass(frozen=True)
class Asked:
    """What is asked of an engine at one time."""

    engine: str
    rows: Sequence[PromptRow]
    sampling: Sampling
    num_samples: int  # of each row
    rewards: Sequence[AnyReward]
    seed: int
    step: int
    what: str = "generate"  # for the progress bar; none where it is empty
    asked_before: int = 0  # other prompts of the same step
    skipped_before: int = 0  # those of them that a reward failed on


def scored_groups(run: Run, asked: Asked, phases: Phases) -> Iterator[Group]:
    """On rank 0: each row's samples with their rewards, in the order in which they end. A group without responses is
    one that a reward failed on."""
    requests = {row.name: _request(run, row, asked) for row in asked.rows}
    row_of = {row.name: row for row in asked.rows}
    pending: dict[str, dict[int, Completion]] = {name: {} for name in requests}
    num_skipped = asked.skipped_before
    deadline_s = run.config.engines[asked.engine].request_timeout_s
    assert run.engines is not None
    answers: Iterable[Completion] = run.engines.client(asked.engine).generate(
        list(requests.values()), deadline_s=deadline_s
    )
    if asked.what:
        answers = run.board.over(answers, asked.what, len(requests) * asked.num_samples, "samples")
    for completion in answers:
        name = completion.prompt_id
        _check(run, completion, pending)
        pending[name][completion.sample] = completion
        if len(pending[name]) == asked.num_samples:
            with phases("score"):
                group = _score(run, asked, row_of[name], requests[name], pending.pop(name), num_skipped)
            num_skipped += not group.responses
            yield group
    if pending:
        lost = [f"{asked.num_samples - len(found)} samples of prompt {name}" for name, found in pending.items()]
        raise RolloutError(listing("the engine ended without", lost))


def collect(run: Run, asked: Asked, phases: Phases) -> list[Trajectory]:
    """The trajectories of all rows, row by row, on rank 0. The others wait until they are there, and get none."""
    groups: dict[str, Group] = {}
    if run.waiting is not None:
        with phases("generate"), run.waiting():
            groups = {group.prompt_id: group for group in scored_groups(run, asked, phases)}
    run.share(Chunk((), last=True) if groups else None, patience_s(run, asked.engine))
    return [trajectory for row in asked.rows for trajectory in groups[row.name].trajectories] if groups else []


def patience_s(run: Run, engine: str) -> float:
    """How long the other ranks wait for what rank 0 generates and scores."""
    settings = run.config.engines[engine]
    return settings.start_timeout_s + settings.request_timeout_s + _SCORING_S


def _check(run: Run, completion: Completion, pending: dict[str, dict[int, Completion]]) -> None:
    """Each sample once, and every token of it from the weights that the engine was given last."""
    name = f"sample {completion.sample} of prompt {completion.prompt_id}"
    if completion.sample in pending.get(completion.prompt_id, {completion.sample: None}):
        raise RolloutError(f"{name} came twice, or was not asked for")
    versions = sorted(set(completion.weight_versions.tolist()))
    if versions != [run.version]:
        raise RolloutError(
            f"{name} was sampled from weights of the versions {versions}, and not from version {run.version} alone, "
            "which the engine was given before it was asked"
        )


def _request(run: Run, row: PromptRow, asked: Asked) -> GenerateRequest:
    return GenerateRequest(
        prompt_id=row.name,
        prompt_tokens=np.asarray(prompt_ids(run.tokenizer, row), np.int32),
        seeds=tuple(sample_seed(asked.seed, asked.step, row.name, sample) for sample in range(asked.num_samples)),
        max_tokens=asked.sampling.max_tokens,
        temperature=asked.sampling.temperature,
        stop_token_ids=run.tokenizer.eos_ids,
        shaping=Shaping(**asked.sampling.shaping),  # type: ignore[arg-type]
    )


def _score(
    run: Run, asked: Asked, row: PromptRow, request: GenerateRequest, found: dict[int, Completion], skipped_before: int
) -> Group:
    """Without responses where a reward failed on one of them and its settings skip the prompt then."""
    completions = [found[sample] for sample in sorted(found)]
    texts = [run.tokenizer.decode(completion.tokens) for completion in completions]
    samples = [Sample(row.name, text, row.prompt, row.answer, row.fields) for text in texts]
    num_prompts = asked.asked_before + len(asked.rows)
    scored = run.score(asked.rewards, samples, num_prompts=num_prompts, skipped_before=skipped_before)
    responses = [
        _response(completion, request.seeds[completion.sample], scores)
        for completion, scores, kept in zip(completions, scored.scores, scored.kept, strict=True)
        if kept
    ]
    return Group(row.name, request.prompt_tokens, tuple(responses), row.teacher)


def _response(completion: Completion, seed: int, rewards: dict[str, float]) -> Response:
    segment = Segment(
        tokens=completion.tokens,
        trained=True,
        behaviour_logprobs=completion.logprobs,
        weight_versions=completion.weight_versions,
    )
    return Response(completion.sample, seed, (segment,), completion.finish_reason, rewards)


def totals(trajectories: Sequence[Trajectory], rewards: Sequence[AnyReward]) -> np.ndarray:
    """The weighted sum of each trajectory's rewards."""
    return np.asarray([total(rewards, t.rewards) for t in trajectories], np.float64)


def reward_means(scores: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """The mean of each reward by its name, before weighting."""
    names = scores[0] if scores else ()
    return {f"{prefix}/score/{name}": float(np.mean([of_one[name] for of_one in scores])) for name in names}

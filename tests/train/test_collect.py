"""What rank 0 does with an engine's answers: groups as they end, and nothing passed over. The engine is scripted."""

from __future__ import annotations

from typing import Any

from megatron_dgrpo.testing import run_forked

VERSION = 3


def _completion(prompt: str, sample: int, versions: tuple[int, ...] = (VERSION, VERSION)) -> Any:
    import numpy as np

    from megatron_dgrpo.rollout.messages import Completion

    count = len(versions)
    tokens = np.full(count, 10 * int(prompt[1:]) + sample, np.int32)
    return Completion(prompt, sample, tokens, -np.ones(count, np.float32), "stop", np.asarray(versions, np.int32), 0)


def _collected(script: list[tuple[Any, ...]], fails: str = "", **before: int) -> Any:
    """The groups that come out of these answers, or the error."""
    from types import SimpleNamespace

    from megatron_dgrpo.config.rewards import ExactMatch
    from megatron_dgrpo.config.schema import Sampling
    from megatron_dgrpo.data.rows import PromptRow
    from megatron_dgrpo.errors import RolloutError
    from megatron_dgrpo.observe.progress import Board
    from megatron_dgrpo.observe.timers import Phases
    from megatron_dgrpo.rewards.base import Failure
    from megatron_dgrpo.rewards.compose import settle
    from megatron_dgrpo.rollout.messages import sample_seed
    from megatron_dgrpo.train.collect import Asked, scored_groups

    def generate(requests: list[Any], *, deadline_s: float) -> Any:
        assert [r.prompt_id for r in requests] == ["p0", "p1"] and deadline_s == 5.0
        assert requests[1].seeds == (sample_seed(11, 4, "p1", 0), sample_seed(11, 4, "p1", 1))
        return (_completion(*answer) for answer in script)

    engine = SimpleNamespace(generate=generate)
    tokenizer = SimpleNamespace(
        encode_prompt=lambda text: [1, 2], decode=lambda tokens: str(int(tokens[0])), eos_ids=(0,)
    )

    def score(rewards: Any, samples: Any, **step: int) -> Any:
        equal = [
            Failure("it hung") if sample.text == fails else float(sample.text == sample.answer) for sample in samples
        ]
        return settle(rewards, [equal], samples, **step)

    run: Any = SimpleNamespace(
        version=VERSION,
        score=score,
        board=Board(),
        tokenizer=tokenizer,
        engines=SimpleNamespace(client=lambda name: engine),
        config=SimpleNamespace(engines={"rollout": SimpleNamespace(request_timeout_s=5.0)}),
    )
    rows = [PromptRow("p0", "?", "1"), PromptRow("p1", "?", "10")]
    asked = Asked(
        "rollout", rows, Sampling(max_tokens=4), 2, [ExactMatch(kind="exact_match")], seed=11, step=4, **before
    )
    try:
        return [
            (g.prompt_id, [(r.sample, r.seed, r.rewards["exact_match"]) for r in g.responses])
            for g in scored_groups(run, asked, Phases())
        ]
    except RolloutError as error:
        return str(error)


ALL = [("p1", 1), ("p0", 0), ("p1", 0), ("p0", 1)]


def test_groups_come_as_they_end_with_their_seeds_and_rewards() -> None:
    from megatron_dgrpo.rollout.messages import sample_seed

    seed = lambda prompt, sample: sample_seed(11, 4, prompt, sample)  # noqa: E731
    assert run_forked(_collected, ALL) == [
        ("p1", [(0, seed("p1", 0), 1.0), (1, seed("p1", 1), 0.0)]),
        ("p0", [(0, seed("p0", 0), 0.0), (1, seed("p0", 1), 1.0)]),
    ]


def test_a_group_that_a_reward_fails_on_has_no_responses() -> None:
    assert [(name, len(responses)) for name, responses in run_forked(_collected, ALL, "11")] == [("p1", 0), ("p0", 2)]


def _in_a_later_round(before: dict[str, int]) -> Any:
    from megatron_dgrpo.errors import RewardError

    try:
        return len(_collected(ALL, "11", **before))
    except RewardError as error:
        return str(error)


def test_failures_of_a_later_round_are_counted_over_the_step() -> None:
    assert run_forked(_in_a_later_round, {"asked_before": 2, "skipped_before": 1}) == 2
    assert "2 of 3 prompts, which is more than half" in run_forked(
        _in_a_later_round, {"asked_before": 1, "skipped_before": 1}
    )


WRONG = [
    (ALL[:3], "the engine ended without\n  - 1 samples of prompt p0"),
    ([*ALL[:2], ALL[1]], "sample 0 of prompt p0 came twice"),
    ([*ALL[:3], ALL[0]], "sample 1 of prompt p1 came twice"),
    ([("p2", 0)], "was not asked for"),
    (
        [("p0", 0, (VERSION - 1,))],
        "sample 0 of prompt p0 was sampled from weights of the versions [2], and not from version 3 alone",
    ),
    ([("p0", 0, (VERSION, VERSION + 1))], "of the versions [3, 4]"),
    ([("p0", 0, ())], "of the versions []"),
]


def _each(scripts: list[Any]) -> list[Any]:
    return [_collected(script) for script in scripts]


def test_what_is_lost_doubled_or_of_other_weights_ends_the_run() -> None:
    for (script, words), said in zip(WRONG, run_forked(_each, [script for script, _ in WRONG]), strict=True):
        assert words in said, script

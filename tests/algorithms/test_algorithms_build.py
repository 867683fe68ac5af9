from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams, sft_loss, sft_streams
from megatron_dgrpo.config.objective import Advantages, Objective
from megatron_dgrpo.errors import ObjectiveError
from megatron_dgrpo.packing.trajectory import Segment, Trajectory

OBJECTIVE = Objective(advantages=Advantages(std="sample", epsilon=0.0))


def segment(tokens, trained=True, behaviour=None, old=None):
    array = lambda x: None if x is None else np.asarray(x, np.float32)  # noqa: E731
    return Segment(np.asarray(tokens, np.int32), trained, array(behaviour), array(old))


def trajectory(prompt_id, sample, prompt, *segments):
    return Trajectory(prompt_id, sample, np.asarray(prompt, np.int32), segments, "stop")


def batch():
    """A response with a tool's output in the middle, groups of 2 and 1, in mixed order."""
    tool = segment([7, 7, 7], False)
    return [
        trajectory("a", 0, [1, 2, 3], segment([5, 6], True, [-1, -2]), tool, segment([8], True, [-3])),
        trajectory("b", 0, [4], segment([9], True, [-0.5])),
        trajectory("a", 1, [1, 2, 3], segment([2, 2, 2, 0], True, [-1, -1, -1, -4])),
    ]  # fmt: skip


def test_streams_list_sampled_tokens_with_the_targets_own_positions():
    got = dgrpo_streams(batch(), [1.0, 7.0, 0.0], OBJECTIVE)
    s = got.streams
    assert s.targets_N.tolist() == [5, 6, 8, 9, 2, 2, 2, 0]
    assert s.sample_N.tolist() == [0, 0, 0, 1, 2, 2, 2, 2] and s.num_samples == 3
    assert s.position_N.tolist() == [3, 4, 8, 1, 3, 4, 5, 6]  # the tool's tokens take 5, 6 and 7
    for i, t in enumerate(batch()):
        document = np.concatenate([t.prompt_tokens, t.response_tokens])
        mine = s.sample_N == i
        assert (document[s.position_N[mine].numpy()] == s.targets_N[mine].numpy()).all()
    assert s.behaviour_logprobs_N.tolist() == [-1, -2, -3, -0.5, -1, -1, -1, -4] and s.old_logprobs_N is None
    assert s.advantages_N.tolist() == pytest.approx([0.5**0.5] * 3 + [0.0] + [-(0.5**0.5)] * 4)
    weights = 1 / 12, 1 / 12, 1 / 12, 1 / 2, 1 / 16, 1 / 16, 1 / 16, 1 / 16  # 1 / (2 prompts x group x length)
    assert s.weights["surrogate"].tolist() == s.weights["teacher_kl"].tolist() == pytest.approx(weights)
    assert got.facts == {"groups": 2, "equal_groups": 1, "loss_tokens": 8}
    assert all(x.dtype == torch.float64 for x in (*s.weights.values(), s.advantages_N, s.behaviour_logprobs_N))


def test_old_logprobs_are_for_all_or_for_none():
    aged = lambda s: segment(s.tokens, s.trained, s.behaviour_logprobs, s.tokens if s.trained else None)  # noqa: E731
    with_old = [replace(t, segments=tuple(aged(s) for s in t.segments)) for t in batch()]
    assert dgrpo_streams(with_old, [0, 0, 0], OBJECTIVE).streams.old_logprobs_N.tolist() == [5, 6, 8, 9, 2, 2, 2, 0]
    with pytest.raises(ObjectiveError) as raised:
        dgrpo_streams([with_old[0], batch()[1], batch()[2]], [0, 0, 0], OBJECTIVE)
    assert "old logprobs" in str(raised.value)
    assert "prompt 'b', sample 0: none" in str(raised.value) and "prompt 'a', sample 1: none" in str(raised.value)


def test_bad_logprobs_are_all_listed():
    bad = batch()
    bad[0] = replace(bad[0], segments=(segment([5, 6], True, [-1, np.nan]), segment([8], True, [-3])))
    bad[2] = replace(bad[2], segments=(segment([2, 2, 2, 0], True, [-1]),))
    with pytest.raises(ObjectiveError) as raised:
        dgrpo_streams(bad, [0, 0, 0], OBJECTIVE)
    assert "prompt 'a', sample 0: not finite at [1]" in str(raised.value)
    assert "prompt 'a', sample 1: 1 for 4 tokens" in str(raised.value)


def test_an_engine_without_finite_logits_is_named_in_short():
    bad = [trajectory("a", i, [1], segment([5], True, [np.nan])) for i in range(55)]
    with pytest.raises(ObjectiveError) as raised:
        dgrpo_streams(bad, [0] * 55, OBJECTIVE)
    lines = str(raised.value).splitlines()
    assert len(lines) == 11 and lines[8].startswith("  - prompt 'a', sample 7: not finite")
    assert lines[9] == "  - and 47 more" and lines[10].startswith("The engine's logits are not finite: check")


def test_rewards_and_samples_are_named_in_errors():
    with pytest.raises(ObjectiveError, match="prompt 'b', sample 0: nan"):
        dgrpo_streams(batch(), [0.0, float("nan"), 0.0], OBJECTIVE)
    with pytest.raises(ObjectiveError, match="twice.*\n.*prompt 'b', sample 0"):
        dgrpo_streams([*batch(), batch()[1]], [0.0] * 4, OBJECTIVE)
    silent = replace(batch()[1], segments=(segment([7], False),))
    with pytest.raises(ObjectiveError, match="at least one loss token.*\n.*prompt 'b', sample 0"):
        dgrpo_streams([batch()[0], silent], [0.0, 0.0], OBJECTIVE)


def test_beta_zero_is_grpo_without_a_teacher():
    loss, factors = dgrpo_loss(Objective(beta=0))
    assert loss.statistics == {"logprob"} and factors == {"surrogate": 1.0}
    assert set(dgrpo_streams(batch(), [0, 0, 0], Objective(beta=0)).streams.weights) == {"surrogate"}
    loss, factors = dgrpo_loss(Objective(beta=0.25, clip_low=0.1, clip_high=0.3))
    assert loss.statistics == {"logprob", "kl"} and factors == {"surrogate": 1.0, "teacher_kl": 0.25}
    assert (loss.terms[0].clip_low, loss.terms[0].clip_high) == (0.1, 0.3)


def test_supervised_examples_need_no_log_probs():
    examples = [trajectory("x", 0, [1, 2], segment([3, 4, 5])), trajectory("y", 0, [1], segment([6]))]
    s = sft_streams(examples).streams
    assert s.targets_N.tolist() == [3, 4, 5, 6] and s.weights["nll"].tolist() == [0.25] * 4
    assert s.position_N.tolist() == [2, 3, 4, 1]
    assert s.advantages_N is None and s.behaviour_logprobs_N is None
    per_example = sft_streams(examples, "sequence_mean").streams.weights["nll"]
    assert per_example.tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])
    loss, factors = sft_loss()
    assert loss.statistics == {"logprob"} and factors == {"nll": 1.0}

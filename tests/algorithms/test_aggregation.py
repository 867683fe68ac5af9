import numpy as np
import pytest

from megatron_dgrpo.algorithms.aggregation import denominator, joint_token_mean, token_weights
from megatron_dgrpo.errors import ObjectiveError

PROMPTS = [7, 7, 7, 3, 5, 5]  # groups of 3, 1 and 2
LENGTHS = [4, 1, 9, 2, 1, 6]
SAMPLE_N = np.repeat(np.arange(6), LENGTHS)
VALUES_N = np.random.default_rng(0).normal(size=len(SAMPLE_N))


def responses(values_N, sample_N=SAMPLE_N):
    return [values_N[sample_N == i] for i in range(6)]


def test_prompt_mean_is_a_mean_of_means_of_means():
    token_means = [v.mean() for v in responses(VALUES_N)]
    group_means = [
        np.mean([m for m, p in zip(token_means, PROMPTS, strict=True) if p == prompt]) for prompt in (7, 3, 5)
    ]
    got = token_weights("sequence_group_prompt_mean", SAMPLE_N, PROMPTS) @ VALUES_N
    assert got == pytest.approx(np.mean(group_means), rel=1e-13)


def test_sequence_mean_is_a_mean_over_responses():
    got = token_weights("sequence_mean", SAMPLE_N, PROMPTS) @ VALUES_N
    assert got == pytest.approx(np.mean([v.mean() for v in responses(VALUES_N)]), rel=1e-13)


def test_token_mean_counts_every_token_once():
    assert token_weights("token_mean", SAMPLE_N, PROMPTS) @ VALUES_N == pytest.approx(VALUES_N.mean(), rel=1e-13)


@pytest.mark.parametrize("aggregation", ["sequence_group_prompt_mean", "sequence_mean", "token_mean"])
@pytest.mark.parametrize("groups", [(7,), (3, 5), (5,), (7, 5)])
def test_a_part_has_the_wholes_weights_by_the_ratio_of_their_denominators(aggregation, groups):
    members = [i for i in range(6) if PROMPTS[i] in groups]
    prompts, lengths = [PROMPTS[i] for i in members], [LENGTHS[i] for i in members]
    part = token_weights(aggregation, np.repeat(np.arange(len(members)), lengths), prompts)
    ratio = denominator(aggregation, prompts, lengths) / denominator(aggregation, PROMPTS, LENGTHS)
    whole = token_weights(aggregation, SAMPLE_N, PROMPTS)[np.isin(SAMPLE_N, members)]
    assert part * ratio == pytest.approx(whole, rel=1e-14)


@pytest.mark.parametrize("aggregation", ["sequence_group_prompt_mean", "sequence_mean", "token_mean"])
def test_weights_follow_the_tokens_in_any_order(aggregation):
    order = np.random.default_rng(1).permutation(len(SAMPLE_N))
    shuffled = token_weights(aggregation, SAMPLE_N[order], PROMPTS)
    assert (shuffled == token_weights(aggregation, SAMPLE_N, PROMPTS)[order]).all()
    assert shuffled.sum() == pytest.approx(1, rel=1e-13)


def test_a_mask_shortens_responses_and_leaves_the_batch():
    """Lengths count acting tokens; a response without any still is one of its group."""
    mask_N = (SAMPLE_N != 4) & (np.arange(len(SAMPLE_N)) % 2 == 0)
    got = token_weights("sequence_group_prompt_mean", SAMPLE_N, PROMPTS, mask_N=mask_N) @ VALUES_N
    means = [v.mean() if v.size else 0.0 for v in responses(VALUES_N[mask_N], SAMPLE_N[mask_N])]
    assert got == pytest.approx((sum(means[:3]) / 3 + means[3] + sum(means[4:]) / 2) / 3, rel=1e-13)
    assert not token_weights("sequence_group_prompt_mean", SAMPLE_N, PROMPTS, mask_N=mask_N)[~mask_N].any()


@pytest.mark.parametrize("aggregation", ["sequence_group_prompt_mean", "sequence_mean", "token_mean"])
def test_a_mask_that_selects_nothing_gives_zeros(aggregation):
    got = token_weights(aggregation, SAMPLE_N, PROMPTS, mask_N=np.zeros(len(SAMPLE_N), bool))
    assert got.shape == SAMPLE_N.shape and not got.any()


def test_a_response_without_loss_tokens_is_an_error_that_names_it():
    sample_N = SAMPLE_N[(SAMPLE_N != 1) & (SAMPLE_N != 5)]
    with pytest.raises(ObjectiveError) as raised:
        token_weights("token_mean", sample_N, PROMPTS, names=[f"prompt p, sample {i}" for i in range(6)])
    assert "prompt p, sample 1" in str(raised.value) and "prompt p, sample 5" in str(raised.value)
    assert "sample 0" not in str(raised.value)


def test_wrong_indices_and_names_are_refused():
    with pytest.raises(ObjectiveError, match="the batch has 5"):
        token_weights("token_mean", SAMPLE_N, PROMPTS[:5])
    with pytest.raises(ObjectiveError, match="sequence_group_prompt_mean, sequence_mean or token_mean"):
        token_weights("batch_mean", SAMPLE_N, PROMPTS)


def test_joint_denominator_spans_the_terms():
    surrogate_N = SAMPLE_N < 3
    distilled_N = ~surrogate_N
    other_N = np.random.default_rng(2).normal(size=len(SAMPLE_N))
    weights = joint_token_mean({"surrogate": surrogate_N, "distillation": distilled_N})
    got = weights["surrogate"] @ VALUES_N + weights["distillation"] @ other_N
    assert got == pytest.approx(np.where(surrogate_N, VALUES_N, other_N).mean(), rel=1e-13)
    both = joint_token_mean({"a": np.ones(4, bool), "b": np.array([True, False, False, False])})
    assert both["a"].tolist() == [0.2] * 4 and both["b"].tolist() == [0.2, 0, 0, 0]
    assert not joint_token_mean({"a": np.zeros(3, bool)})["a"].any()
    with pytest.raises(ObjectiveError, match="different lengths"):
        joint_token_mean({"a": np.ones(3, bool), "b": np.ones(4, bool)})

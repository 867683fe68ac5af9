"""The dense reference against figures worked out by hand, and its gradient against finite differences."""

import math

import pytest
import torch

from megatron_dgrpo.testing.reference import Response, dgrpo, nll


def bigram(table):
    return lambda ids: table[ids]


def log_p(table, before, token, temperature=1.0):
    row = [float(x) / temperature for x in table[before]]
    return row[token] - math.log(sum(math.exp(x) for x in row))


def test_two_responses_by_hand():
    """Two prompts; the first has two responses with rewards 1 and 0, the second one alone."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    responses = [
        Response([0, 1], [2, 3], 1.0, "a", old_logprobs=[-1.0, -9.0]),
        Response([0, 1], [3], 0.0, "a", old_logprobs=[-0.01]),
        Response([2], [1, 0, 0], 5.0, "b", old_logprobs=[0.0, 0.0, -2.0]),
    ]
    got = dgrpo(
        responses, bigram(student), bigram(teacher), beta=0.3, clip_low=0.1, clip_high=0.4, temperature=0.5, epsilon=0.5
    )
    assert got.advantages == pytest.approx([0.5, -0.5, 0.0])  # +-0.5 / (0.5 + 0.5)

    def kl(before):
        p = [math.exp(log_p(student, before, v, 0.5)) for v in range(4)]
        return sum(p[v] * (log_p(student, before, v, 0.5) - log_p(teacher, before, v, 0.5)) for v in range(4))

    def gain(before, token, old, advantage):
        r = math.exp(log_p(student, before, token, 0.5) - old)
        return min(r * advantage, min(max(r, 0.9), 1.4) * advantage)

    first = (gain(1, 2, -1.0, 0.5) + gain(2, 3, -9.0, 0.5)) / 2
    surrogate = -((first + gain(1, 3, -0.01, -0.5)) / 2 + 0.0) / 2
    divergence = (((kl(1) + kl(2)) / 2 + kl(1)) / 2 + (kl(2) + kl(1) + kl(0)) / 3) / 2
    assert float(got.surrogate) == pytest.approx(surrogate, rel=1e-13)
    assert float(got.kl) == pytest.approx(divergence, rel=1e-13)
    assert float(got.loss) == pytest.approx(surrogate + 0.3 * divergence, rel=1e-13)
    assert got.clipped_high >= 1 / 6 and got.ratios[0][1] > 1.4


@pytest.mark.parametrize("stale", [False, True])
def test_gradient_equals_finite_differences(stale):
    torch.manual_seed(1)
    table, teacher = torch.randn(5, 5).double(), torch.randn(5, 5).double()
    shapes = [([1, 2, 4], 1.0, None), ([3], 0.0, None), ([4, 4], 0.5, [False, True])]

    def loss(of, old):
        responses = [Response([0], tokens, r, 0, o, mask) for (tokens, r, mask), o in zip(shapes, old, strict=True)]
        return dgrpo(responses, bigram(of), bigram(teacher), beta=0.7).loss

    leaf = table.clone().requires_grad_()
    fixed = [[-1.5] * 3, [-1.5], [-1.5] * 2]
    if not stale:  # the old policy is the one at this point: it stays there while the live one moves
        fixed = [[log_p(table, b, t) for b, t in zip([0, *tokens], tokens, strict=False)] for tokens, _, _ in shapes]
    loss(leaf, fixed if stale else [None] * 3).backward()
    step = 1e-6
    for i, j in [(0, 1), (1, 2), (2, 4), (4, 0), (3, 3)]:
        move = torch.zeros(5, 5).double()
        move[i, j] = step
        slope = float(loss(table + move, fixed) - loss(table - move, fixed)) / (2 * step)
        assert float(leaf.grad[i, j]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_masked_tokens_are_context_only():
    torch.manual_seed(2)
    table, teacher = torch.randn(6, 6).double(), torch.randn(6, 6).double()
    seen = dgrpo(
        [Response([0], [1, 2, 3], 0.0, 0, [-1.0, -7.0, -2.0], [True, False, True])],
        bigram(table),
        bigram(teacher),
        beta=1.0,
    )
    assert len(seen.logprobs[0]) == len(seen.kls[0]) == 2
    assert seen.logprobs[0][1] == pytest.approx(log_p(table, 2, 3), rel=1e-13)


@pytest.mark.parametrize("sizes", [(6, 8), (8, 6)])
def test_vocabularies_of_two_sizes_share_ids(sizes):
    """The KL is over renormalised shared ids; the log-prob over all of the student's."""
    torch.manual_seed(3)
    student, teacher = torch.randn(6, sizes[0]).double(), torch.randn(6, sizes[1]).double()
    got = dgrpo([Response([0], [1, 5], 0.0, 0)], bigram(student), bigram(teacher), beta=1.0)
    cut = dgrpo([Response([0], [1, 5], 0.0, 0)], bigram(student[:, :6]), bigram(teacher[:, :6]), beta=1.0)
    assert float(got.kl) == pytest.approx(float(cut.kl), rel=1e-13)
    assert (got.logprobs == cut.logprobs) == (sizes[0] == 6)


def test_a_group_of_equal_rewards_keeps_its_kl():
    torch.manual_seed(4)
    table = torch.randn(4, 4).double().requires_grad_()
    got = dgrpo(
        [Response([0], [i], 0.1, 0) for i in (1, 2, 3)], bigram(table), bigram(torch.randn(4, 4).double()), beta=1.0
    )
    assert got.advantages == [0.0] * 3 and float(got.surrogate.detach()) == 0.0
    got.loss.backward()
    assert table.grad.abs().max() > 1e-3


@pytest.mark.parametrize("std, expected", [("population", 1.0), ("sample", math.sqrt(0.5))])
def test_the_convention_of_the_deviation(std, expected):
    table = torch.zeros(3, 3).double()
    got = dgrpo([Response([0], [1], r, 0) for r in (0.0, 1.0)], bigram(table), None, beta=0.0, std=std, epsilon=0.0)
    assert got.advantages == pytest.approx([-expected, expected], rel=1e-13)


def test_nll_is_the_mean_over_all_answer_tokens():
    torch.manual_seed(5)
    table = torch.randn(4, 4).double()
    expected = -(log_p(table, 1, 2) + log_p(table, 3, 0) + log_p(table, 0, 0)) / 3
    assert float(nll([([0, 1], [2]), ([3], [0, 0])], bigram(table))) == pytest.approx(expected, rel=1e-13)

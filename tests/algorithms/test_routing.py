import pytest

from megatron_dgrpo.algorithms.routing import srpo_routes, srpo_weights
from megatron_dgrpo.errors import ObjectiveError

CORRECT = [True, False, False, False, False, True, True]
PROMPTS = [8, 8, 3, 3, 8, 5, 5]


def test_wrong_responses_with_a_correct_sibling_are_distilled():
    assert srpo_routes(CORRECT, PROMPTS).tolist() == [False, True, False, False, True, False, False]


def test_feedback_stands_in_for_a_sibling():
    feedback = [True, False, False, True, False, False, True]
    assert srpo_routes(CORRECT, PROMPTS, feedback).tolist() == [False, True, False, True, True, False, False]


def test_routed_tokens_share_one_denominator():
    weights = srpo_weights([False, True], [0, 0, 1, 1, 1], surrogate="surrogate", distillation="teacher_jsd")
    assert weights["surrogate"].tolist() == [0.2, 0.2, 0, 0, 0]
    assert weights["teacher_jsd"].tolist() == [0, 0, 0.2, 0.2, 0.2]


def test_lengths_must_agree():
    with pytest.raises(ObjectiveError, match="not 2, 1 and 2"):
        srpo_routes([True, False], [0])

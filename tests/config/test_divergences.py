import pytest

from megatron_dgrpo.config.divergences import ESTIMATORS, refusal


def test_legal_pairs_are_not_refused():
    assert all(refusal(divergence, e) is None for divergence, estimators in ESTIMATORS.items() for e in estimators)


@pytest.mark.parametrize(
    "divergence, estimator, reason",
    [
        ("reverse_kl", "k1", "expected gradient zero"),
        ("forward_kl", "k1", "expected gradient zero"),
        ("reverse_kl", "k3", "gradient of the forward KL"),
        ("reverse_kl", "k3_advantage", "vanishes as the student nears the teacher"),
        ("jsd", "k3_advantage", "vanishes as the student nears the teacher"),
        ("forward_kl", "sampled", "forward_kl has no estimator 'sampled': it has exact, k3"),
        ("jsd", "topk_student_tail", "jsd has no estimator"),
        ("kl", "exact", "reverse_kl, forward_kl, jsd"),
    ],
)
def test_refusals_say_why(divergence, estimator, reason):
    assert reason in refusal(divergence, estimator)

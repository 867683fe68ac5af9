"""The names of the divergences to a teacher and of their estimators, and why some are refused. Imports no torch.

Which gradient an estimator has is not what its value suggests. With v drawn from the student, l = log p(v) - log q(v)
and d = exp(-l), k1 = l, k2 = l^2 / 2 and k3 = d - 1 + l, the expected gradients are

    k1 as a loss                  0: the mean of a score function, whatever the teacher
    k1 as an advantage            grad KL(student || teacher)
    k2 as a loss                  grad KL(student || teacher)
    k3 as a loss                  grad KL(teacher || student)
    k3 as an advantage            grad KL(student || teacher) - grad KL(teacher || student), and vanishing as p -> q

so a name here says whose gradient it has. Without a student's distribution over the vocabulary only `sampled` and `k2`
(reverse KL) and `k3` (forward KL) are left; with it `exact` has no variance and no bias.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Estimator = Literal[
    "exact",
    "topk_student_tail",
    "topk_student_stopgrad",
    "topk_teacher_tail",
    "topk_teacher_stopgrad",
    "sampled",
    "k2",
    "k3",
]

ESTIMATORS: dict[Divergence, tuple[Estimator, ...]] = {
    "reverse_kl": (
        "exact",
        "topk_student_tail",
        "topk_student_stopgrad",
        "topk_teacher_tail",
        "topk_teacher_stopgrad",
        "sampled",
        "k2",
    ),
    "forward_kl": ("exact", "k3"),
    "jsd": ("exact",),
}
"""The legal pairs. `sampled` is k1 as an advantage; `k3` exists as the forward KL's estimator alone."""

_NEVER: dict[str, str] = {
    "k1": (
        "k1 as a loss has expected gradient zero, it does not depend on the teacher: use 'sampled' (k1 as an"
        " advantage), 'k2' or 'exact'"
    ),
    "k3_advantage": (
        "k3 as an advantage has the gradient of KL(student || teacher) - KL(teacher || student), which vanishes as the"
        " student nears the teacher: use 'sampled' (k1 as an advantage)"
    ),
}
_K3_IS_FORWARD = (
    "k3 as a loss has the gradient of the forward KL(teacher || student), not of the reverse one: use 'exact', 'k2' or"
    " 'sampled', or say divergence 'forward_kl' where that is what is meant"
)


def never(estimator: str) -> str | None:
    """Why no divergence has this estimator, or None where that is not known."""
    return _NEVER.get(estimator)


def refusal(divergence: str, estimator: str) -> str | None:
    """Why this pair cannot be trained on, or None where it can."""
    if divergence not in get_args(Divergence):
        return f"no divergence is called {divergence!r}: use one of {', '.join(get_args(Divergence))}"
    legal = ESTIMATORS[cast(Divergence, divergence)]
    if estimator in legal:
        return None
    if (divergence, estimator) == ("reverse_kl", "k3"):
        return _K3_IS_FORWARD
    return _NEVER.get(estimator, f"{divergence} has no estimator {estimator!r}: it has {', '.join(legal)}")

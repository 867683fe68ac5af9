"""Routing: which response feeds which term.

SRPO sends a wrong response to self-distillation where the teacher has something to say about it (a correct sibling in
its group, or feedback), and every other one to the surrogate. Both terms share one denominator: all routed tokens.

Legend: _B responses of the batch, _N loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_dgrpo.algorithms.aggregation import joint_token_mean
from megatron_dgrpo.errors import ObjectiveError


def srpo_routes(
    correct_B: Sequence[bool] | np.ndarray,
    prompt_B: Sequence[int] | np.ndarray,
    feedback_B: Sequence[bool] | np.ndarray | None = None,
) -> np.ndarray:
    """True where a response is distilled: wrong, with a correct sibling or feedback. A group that is all wrong and has
    no feedback stays with the surrogate, where its advantage is 0."""
    correct_B = np.asarray(correct_B, dtype=bool)
    prompt_B = np.asarray(prompt_B)
    informed_B = np.zeros(len(correct_B), bool) if feedback_B is None else np.asarray(feedback_B, dtype=bool)
    if not len(correct_B) == len(prompt_B) == len(informed_B):
        raise ObjectiveError(
            f"routing needs one verdict, one prompt and one feedback flag per response, not {len(correct_B)},"
            f" {len(prompt_B)} and {len(informed_B)}"
        )
    solved = np.unique(prompt_B[correct_B])
    return ~correct_B & (np.isin(prompt_B, solved) | informed_B)


def srpo_weights(
    distilled_B: np.ndarray, sample_N: np.ndarray, *, surrogate: str, distillation: str
) -> dict[str, np.ndarray]:
    """The two terms' weight streams, named as the terms are."""
    distilled_N = np.asarray(distilled_B, dtype=bool)[sample_N]
    return joint_token_mean({surrogate: ~distilled_N, distillation: distilled_N})

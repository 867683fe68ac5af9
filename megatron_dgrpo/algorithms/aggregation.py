"""Weights: how much each loss token counts, with the whole of the normalisation in it.

A term's loss is `sum over all loss tokens of all ranks of weight x value`, and nothing divides afterwards. So the
denominators are formed here, once, over the global batch; any split of the tokens over micro-batches, data-parallel or
context-parallel ranks then gives the same sum.

    sequence_group_prompt_mean   1 / (P G_p |o_i|)     mean over a response's tokens, its group, the prompts (dGRPO)
    sequence_mean                1 / (N |o_i|)         mean over a response's tokens, then over all responses
    token_mean                   1 / sum_i |o_i|       mean over all tokens

|o_i| is the number of *loss* tokens: what the policy sampled, not what a tool wrote into the response. A term may act
on some of them only (a mask); |o_i| then counts those, while P, G_p and N stay the batch's. A response without any of
them contributes nothing.

`joint_token_mean` gives several terms one denominator, the number of tokens that any of them acts on (SRPO).

Legend: _N loss tokens of the batch, _B responses of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from megatron_dgrpo.errors import ObjectiveError, listing

Aggregation = Literal["sequence_group_prompt_mean", "sequence_mean", "token_mean"]


def token_weights(
    aggregation: Aggregation,
    sample_N: np.ndarray,
    prompt_B: Sequence[int] | np.ndarray,
    *,
    mask_N: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """The weight of each loss token (float64), given its response and each response's prompt.

    All responses of the batch must be listed in `prompt_B`; one without any loss token is an error, for it would
    change the denominators without being seen. All-false masks give all-zero weights: the term's loss is then 0, and
    its metrics say that it acted on nothing.
    """
    prompt_B = np.asarray(prompt_B, dtype=np.int64)
    num_samples = len(prompt_B)
    _check(np.asarray(sample_N), num_samples, names)
    acting_N = np.ones(len(sample_N)) if mask_N is None else np.asarray(mask_N, dtype=bool).astype(np.float64)
    length_B = np.bincount(sample_N, weights=acting_N, minlength=num_samples)
    if aggregation == "token_mean":
        total = length_B.sum()
        return acting_N / total if total else acting_N
    if aggregation == "sequence_mean":
        share_B = np.full(num_samples, 1.0 / max(num_samples, 1))
    elif aggregation == "sequence_group_prompt_mean":
        prompts, group_B, group_size = np.unique(prompt_B, return_inverse=True, return_counts=True)
        share_B = 1.0 / (len(prompts) * group_size[group_B])
    else:
        raise ObjectiveError(
            f"no aggregation is called {aggregation!r}: use sequence_group_prompt_mean, sequence_mean or token_mean"
        )
    return acting_N * (share_B / np.maximum(length_B, 1.0))[sample_N]


def denominator(aggregation: Aggregation, prompt_B: Sequence[int] | np.ndarray, length_B: Sequence[int]) -> float:
    """What the weights of these responses have in common: the number of prompts, responses or tokens.

    A part of a batch that has whole groups gets the whole batch's weights when its own are multiplied by its
    denominator over the whole batch's.
    """
    if aggregation == "sequence_group_prompt_mean":
        return float(len(set(np.asarray(prompt_B).tolist())))
    return float(len(length_B) if aggregation == "sequence_mean" else sum(length_B))


def joint_token_mean(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of several terms over one denominator: the (token, term) pairs that their masks select."""
    acting = {term: np.asarray(mask_N, dtype=bool).astype(np.float64) for term, mask_N in masks.items()}
    if len({len(mask_N) for mask_N in acting.values()}) > 1:
        lengths = ", ".join(f"{term}: {len(mask_N)}" for term, mask_N in acting.items())
        raise ObjectiveError(f"masks over the same tokens have different lengths ({lengths})")
    total = sum(mask_N.sum() for mask_N in acting.values())
    return {term: mask_N / total if total else mask_N for term, mask_N in acting.items()}


def _check(sample_N: np.ndarray, num_samples: int, names: Sequence[str] | None) -> None:
    if sample_N.size and (sample_N.min() < 0 or sample_N.max() >= num_samples):
        raise ObjectiveError(
            f"tokens belong to responses {sample_N.min()} to {sample_N.max()}, but the batch has {num_samples}"
        )
    empty = np.flatnonzero(np.bincount(sample_N, minlength=num_samples) == 0).tolist()
    if empty:
        raise ObjectiveError(
            listing(
                "a response needs at least one loss token (the stop id counts); leave these out of the batch:",
                (names[i] if names is not None else f"response {i}" for i in empty),
            )
        )

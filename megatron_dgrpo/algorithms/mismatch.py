"""The mismatch of trainer and rollout engine: their log-probs of the same tokens at the same weights.

With d = the trainer's log-prob of a sampled token - the engine's, over the tokens that the engine sampled:

    abs, p99, max   of |d|
    ratio           mean of exp(d); 1 in expectation where both are whole distributions
    k1, k3          mean of -d and of exp(d) - 1 - d: both estimate KL(engine || trainer); k3 varies less
    outside         share of the tokens whose ratio exp(d) is out of [0.5, 2]

all of them for the whole batch and by position. The trainer's log-probs are the old ones where there are some, else the
live ones, so that every update of a batch compares the weights that the engine had.

p99 over ranks and micro-batches comes from a histogram, whose counts add up. Its bins are 5 % wide, from 1e-9 to 1e3,
so that the figure is at most 5 % above the truth; where a single token is beyond it is `max` that tells.

Legend: _T rows, _B position buckets, _S bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from megatron_dgrpo.algorithms.metrics import Max, Mean, Metric, Quantile
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.config.mismatch import Figures, Mismatch
from megatron_dgrpo.errors import MismatchError, listing

LOWEST, STEP, NUM_BINS = 1e-9, math.log(1.05), 568
"""The first bin holds what is below LOWEST, and the last what is above 1e3."""
_EXP_CLAMP = 50.0
"""exp(d) is held below exp(50)."""


def mismatch_metrics(logprob_T: torch.Tensor, streams: Streams, edges: Sequence[int]) -> dict[str, Metric]:
    """Of the whole batch as `mismatch/FIGURE`, of positions as `mismatch/FIGURE@FIRST`; none without behaviour."""
    if streams.behaviour_logprobs_N is None:
        return {}
    trainer_T = logprob_T.detach() if streams.old_logprobs_N is None else streams.old_logprobs_N
    gap_T = trainer_T.double() - streams.behaviour_logprobs_N.double()
    size_T, ratio_T = gap_T.abs(), gap_T.clamp(max=_EXP_CLAMP).exp()
    rows = {
        "abs": size_T,
        "ratio": ratio_T,
        "k1": -gap_T,
        "k3": ratio_T - 1 - gap_T,
        "outside": (size_T > math.log(2.0)).double(),
    }
    num_buckets = len(edges) + 1
    bounds = torch.tensor(list(edges), device=gap_T.device)
    bucket_T = torch.bucketize(streams.position_N, bounds, right=True)
    count_B = torch.bincount(bucket_T, minlength=num_buckets).double()
    bin_T = ((size_T.clamp(min=LOWEST) / LOWEST).log() / STEP).ceil().nan_to_num(NUM_BINS).clamp(0, NUM_BINS - 1).long()
    count_BS = torch.bincount(bucket_T * NUM_BINS + bin_T, minlength=num_buckets * NUM_BINS).double()
    count_BS = count_BS.view(num_buckets, NUM_BINS)
    max_B = gap_T.new_full((num_buckets,), -math.inf).scatter_reduce(0, bucket_T, size_T, "amax")
    total_B = {name: gap_T.new_zeros(num_buckets).index_add(0, bucket_T, row_T) for name, row_T in rows.items()}

    metrics: dict[str, Metric] = {}
    for name, sums_B in total_B.items():
        metrics[f"mismatch/{name}"] = Mean(sums_B.sum(), count_B.sum())
    metrics["mismatch/p99"] = _p99(count_BS.sum(0))
    metrics["mismatch/max"] = Max(max_B.max())
    for i, first in enumerate((0, *edges)):
        for name, sums_B in total_B.items():
            metrics[f"mismatch/{name}@{first}"] = Mean(sums_B[i], count_B[i])
        metrics[f"mismatch/p99@{first}"] = _p99(count_BS[i])
        metrics[f"mismatch/max@{first}"] = Max(max_B[i])
    return metrics


def _p99(count_S: torch.Tensor) -> Quantile:
    return Quantile(count_S, 0.99, LOWEST, STEP)


def beyond(limits: Figures, numbers: Mapping[str, float]) -> list[str]:
    """The figures of an update that are above their limits, in words."""
    found = []
    for name, limit in limits.model_dump(exclude_none=True).items():
        value = numbers.get(f"mismatch/{name}")
        if value is not None and not value <= limit:
            found.append(f"mismatch/{name} is {value:.4g}, above {limit:g}")
    return found


def check_mismatch(settings: Mismatch, numbers: Mapping[str, float], where: str) -> str:
    """Words of warning, or none; raises where a figure is beyond what ends the run. `where` is a stage's path."""
    if found := beyond(settings.stop, numbers):
        raise MismatchError(
            listing("The trainer's and the engine's log-probs of the same tokens differ; no weight was changed:", found)
            + f"\nWithout an update yet, look for another dtype, rope or temperature on one side; later, for weights "
            f"that did not arrive (mismatch by position is in metrics.jsonl). If it is the engine's arithmetic, set "
            f"{where}.objective.correction, or raise {where}.mismatch.stop"
        )
    found = beyond(settings.warn, numbers)
    return listing("The trainer's and the engine's log-probs of the same tokens differ:", found) if found else ""

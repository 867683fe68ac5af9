"""Trainer against engine: the figures against numpy on the whole batch, however it is cut; limits."""

import math

import numpy as np
import pytest
import torch

from megatron_dgrpo.algorithms.metrics import merge, pack, unpack, values
from megatron_dgrpo.algorithms.mismatch import check_mismatch, mismatch_metrics
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.config.mismatch import Figures, Mismatch
from megatron_dgrpo.errors import MismatchError

N, EDGES = 3000, (1000, 2500, 9000)
WHERE = {"": slice(N), "@0": slice(1000), "@1000": slice(1000, 2500), "@2500": slice(2500, N)}


def batch(scale: float = 0.01, old: bool = True):
    draw = np.random.default_rng(0)
    gap_N = scale * draw.standard_t(2, N)
    gap_N[::500] *= 100
    old_N = -draw.random(N)
    live_N = old_N + 0.3 * draw.standard_normal(N) if old else old_N
    streams = Streams(
        targets_N=torch.zeros(N, dtype=torch.long),
        sample_N=torch.zeros(N, dtype=torch.long),
        position_N=torch.arange(N),
        weights={},
        behaviour_logprobs_N=torch.from_numpy(old_N - gap_N),
        old_logprobs_N=torch.from_numpy(old_N) if old else None,
    )
    return torch.from_numpy(live_N), streams, gap_N


def figures(gap_N):
    return {
        "abs": np.abs(gap_N).mean(),
        "max": np.abs(gap_N).max(),
        "ratio": np.exp(gap_N).mean(),
        "k1": -gap_N.mean(),
        "k3": (np.exp(gap_N) - 1 - gap_N).mean(),
        "outside": ((np.exp(gap_N) > 2) | (np.exp(gap_N) < 0.5)).mean(),
    }


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("cuts", [[], [10], [0, 700, 700, 2900]])
def test_the_figures_are_those_of_the_whole_batch_over_ranks_and_micro_batches(cuts, old):
    live_N, streams, gap_N = batch(old=old)
    parts = []
    for rows in torch.tensor_split(torch.randperm(N, generator=torch.Generator().manual_seed(1)), cuts):
        live_T = live_N[rows].requires_grad_()
        parts.append(mismatch_metrics(live_T, streams.select(rows), EDGES))
    packed = [pack(part) for part in parts]
    sums, maxima = torch.stack([s for s, _ in packed]).sum(0), torch.stack([m for _, m in packed]).amax(0)
    for got in (values(merge(parts)), values(unpack(parts[0], sums, maxima))):
        for name, rows in WHERE.items():
            for figure, expected in figures(gap_N[rows]).items():
                assert got[f"mismatch/{figure}{name}"] == pytest.approx(expected, rel=1e-9, abs=1e-12), figure
            p99 = np.quantile(np.abs(gap_N[rows]), 0.99, method="inverted_cdf")
            assert p99 <= got[f"mismatch/p99{name}"] <= 1.05 * p99 * (1 + 1e-9)
        assert not any(name.endswith("@9000") for name in got)


def test_p99_keeps_to_its_bins_at_both_ends_and_with_nan():
    _, streams, _ = batch()
    for gap, expected in ((0.0, 1e-9), (1e-12, 1e-9), (1e6, 1e3), (math.nan, 1e3)):
        live_N = streams.old_logprobs_N
        shifted = Streams(**{**vars(streams), "behaviour_logprobs_N": live_N - gap})
        got = values(mismatch_metrics(live_N, shifted, EDGES))["mismatch/p99"]
        assert got == pytest.approx(expected, rel=0.06)


def test_without_the_engines_log_probs_there_is_no_mismatch():
    live_N, streams, _ = batch()
    assert mismatch_metrics(live_N, Streams(**{**vars(streams), "behaviour_logprobs_N": None}), EDGES) == {}


def test_limits_warn_and_stop():
    live_N, streams, gap_N = batch(0.2)
    numbers = values(mismatch_metrics(live_N, streams, EDGES))
    assert check_mismatch(Mismatch(warn=Figures(abs=1e9, p99=1e9)), numbers, "stages.1") == ""
    words = check_mismatch(Mismatch(warn=Figures(abs=0.1, max=0.5, p99=1e3)), numbers, "stages.1")
    assert "mismatch/abs is" in words and "mismatch/max is" in words and "p99" not in words
    with pytest.raises(MismatchError, match=r"(?s)no weight was changed.*/outside is .*, above 0.001.*stages.1."):
        check_mismatch(Mismatch(stop=Figures(outside=1e-3)), numbers, "stages.1")
    assert "k3" in check_mismatch(Mismatch(), {"mismatch/k3": math.nan}, "stages.0")

import pytest
import torch

from megatron_dgrpo.algorithms.metrics import Mean, Quantile, Sum, max_of, mean_of, merge, pack, sum_of, unpack, values


def some(values_T, weight_T):
    return {
        "mean": mean_of(values_T, weight_T),
        "plain": mean_of(values_T),
        "total": sum_of(values_T),
        "largest": max_of(values_T),
        "largest_acting": max_of(values_T, weight_T != 0),
        "median": Quantile(torch.histc(values_T.exp(), 50, 0.0, 12.5).double(), 0.5, 0.25, 0.1),
    }


@pytest.mark.parametrize("cuts", [[], [3], [0, 4], [2, 2, 9], [10]])
def test_splits_add_up_to_the_whole(cuts):
    torch.manual_seed(0)
    values_T, weight_T = torch.randn(10), torch.rand(10).round()
    parts = [
        some(v, w) for v, w in zip(torch.tensor_split(values_T, cuts), torch.tensor_split(weight_T, cuts), strict=True)
    ]
    got = values(merge(parts))
    assert got["mean"] == pytest.approx(float((values_T * weight_T).double().sum() / weight_T.sum()), rel=1e-12)
    assert got["plain"] == pytest.approx(float(values_T.double().mean()), rel=1e-12)
    assert got["total"] == pytest.approx(float(values_T.double().sum()), rel=1e-12)
    assert got["largest"] == float(values_T.max())
    assert got["largest_acting"] == float(values_T[weight_T != 0].max())


def test_packing_reduces_like_merging():
    torch.manual_seed(1)
    ranks = [some(torch.randn(n), torch.ones(n)) for n in (4, 0, 7)]
    packed = [pack(metrics) for metrics in ranks]
    sums = torch.stack([s for s, _ in packed]).sum(0)
    maxima = torch.stack([m for _, m in packed]).amax(0)
    assert sums.dtype == maxima.dtype == torch.float64
    assert values(unpack(ranks[1], sums, maxima)) == pytest.approx(values(merge(ranks)), rel=1e-14)


def test_nothing_to_average_is_left_out_and_sums_stay_zero():
    got = values(some(torch.zeros(0), torch.zeros(0)))
    assert got == {"total": 0.0}
    masked = values({"m": mean_of(torch.tensor([float("nan"), 2.0]), torch.tensor([0.0, 1.0]))})
    assert masked == {"m": 2.0}
    assert [v.tolist() for v in pack({})] == [[], []]


def test_one_name_has_one_kind():
    one = torch.ones(())
    with pytest.raises(TypeError, match="x is a Sum in one place and a Mean in another"):
        merge([{"x": Sum(one)}, {"x": Mean(one, one)}])

import torch

from megatron_dgrpo.algorithms.streams import Streams


def streams(optional=True):
    n = torch.arange(5)
    some = lambda x: (n + x).double() if optional else None  # noqa: E731
    return Streams(
        targets_N=n + 10, sample_N=n // 2, position_N=n + 100, weights={"a": n.double() / 8, "b": n.double()},
        advantages_N=some(1), behaviour_logprobs_N=some(2), old_logprobs_N=some(3), num_samples=3,
    )  # fmt: skip


def test_select_keeps_streams_together_in_the_order_asked_for():
    rows_R = torch.tensor([4, 0, 0, 3])
    got = streams().select(rows_R)
    assert got.num_tokens == 4 and got.num_samples == 3
    assert got.targets_N.tolist() == [14, 10, 10, 13] and got.sample_N.tolist() == [2, 0, 0, 1]
    assert got.position_N.tolist() == [104, 100, 100, 103]
    assert got.weights["a"].tolist() == [0.5, 0.0, 0.0, 0.375] and got.weights["b"].tolist() == [4, 0, 0, 3]
    assert got.advantages_N.tolist() == [5, 1, 1, 4]
    assert got.behaviour_logprobs_N.tolist() == [6, 2, 2, 5] and got.old_logprobs_N.tolist() == [7, 3, 3, 6]


def test_optional_streams_stay_absent():
    got = streams(optional=False).select(torch.tensor([1])).to("cpu", torch.float32)
    assert got.advantages_N is None and got.behaviour_logprobs_N is None and got.old_logprobs_N is None


def test_to_casts_what_is_floating_point():
    got = streams().to("cpu", torch.float32)
    assert got.targets_N.dtype == got.sample_N.dtype == got.position_N.dtype == torch.int64
    floats = [*got.weights.values(), got.advantages_N, got.behaviour_logprobs_N, got.old_logprobs_N]
    assert {x.dtype for x in floats} == {torch.float32}
    assert streams().to("cpu").advantages_N.dtype == torch.float64

import pytest
import torch

from megatron_dgrpo.algorithms.diagnostics import balance_values, by_position, gradient_balance, sign_disagreement
from megatron_dgrpo.algorithms.losses import Loss
from megatron_dgrpo.algorithms.metrics import merge, values
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import ClippedSurrogate, entropy, forward_kl, jsd, reverse_kl
from megatron_dgrpo.testing.dense import DenseStatistics

T, V, H = 200, 8, 5
EDGES = (10, 40)
TERMS = (ClippedSurrogate(), reverse_kl(), forward_kl(), entropy())


class World:
    def __init__(self, lacking=0):
        torch.manual_seed(0)
        self.hidden_TH = torch.randn(T, H, dtype=torch.float64).requires_grad_()
        self.logits_TV = self.hidden_TH @ torch.randn(H, V, dtype=torch.float64)
        self.logits_TV.retain_grad()
        targets_T = torch.randint(V, (T,))
        self.statistics = DenseStatistics.of(
            self.logits_TV, torch.randn(T, V - lacking, dtype=torch.float64), targets_T
        )
        logprob_T = self.statistics.logprob_T.detach()
        weights = {term.name: torch.rand(T, dtype=torch.float64).round() for term in (*TERMS, jsd())}
        self.streams = Streams(
            targets_N=targets_T, sample_N=targets_T, position_N=torch.arange(T), weights=weights,
            advantages_N=torch.randn(T, dtype=torch.float64),
            behaviour_logprobs_N=logprob_T + 0.1, old_logprobs_N=logprob_T + 0.4 * torch.randn(T, dtype=torch.float64),
        )  # fmt: skip

    def evaluate(self, terms=TERMS, factors=None):
        return Loss(terms).evaluate(self.statistics, self.streams, factors)


def test_means_by_position_are_those_of_the_rows_in_the_bucket():
    world = World()
    evaluation = world.evaluate()
    got = values(by_position(evaluation, world.statistics, world.streams, EDGES))
    position_T = world.streams.position_N
    buckets = {0: position_T < 10, 10: (position_T >= 10) & (position_T < 40), 40: position_T >= 40}
    for first, rows_T in buckets.items():
        assert got[f"row/entropy@{first}"] == pytest.approx(world.statistics.entropy_T[rows_T].mean().item())
        assert got[f"row/teacher_mass@{first}"] == pytest.approx(
            world.statistics.teacher_logprob_T[rows_T].exp().mean().item()
        )
        acting_T = rows_T & (world.streams.weights["teacher_kl"] != 0)
        assert got[f"teacher_kl/kl@{first}"] == pytest.approx(world.statistics.kl_T[acting_T].mean().item())
        acting_T = rows_T & (world.streams.weights["surrogate"] != 0)
        for key in ("ratio", "clipped_high", "clipped_low"):
            expected = evaluation.terms["surrogate"].rows[key][acting_T].double().mean().item()
            assert got[f"surrogate/{key}@{first}"] == pytest.approx(expected)


def test_buckets_without_rows_are_there_and_add_up():
    world = World()
    loss, whole = Loss(TERMS), values(by_position(world.evaluate(), world.statistics, world.streams, EDGES))
    parts = []
    for rows in (torch.arange(0), torch.arange(25), torch.arange(25, T)):
        statistics = DenseStatistics(*(x[rows] for x in vars(world.statistics).values()))
        streams = world.streams.select(rows)
        parts.append(by_position(loss.evaluate(statistics, streams), statistics, streams, EDGES))
    assert set(parts[0]) == set(parts[1])
    assert values(merge(parts)) == pytest.approx(whole)


@pytest.mark.parametrize("lacking", [0, 3])
def test_sign_disagreement_is_that_of_the_sampled_tokens_logit(lacking):
    world = World(lacking)
    factors = {"surrogate": 1.0, "teacher_kl": 0.5, "teacher_forward_kl": 0.1, "entropy": -0.3}
    evaluation = world.evaluate(factors=factors)
    slope = {}
    for name in factors:
        coefficients = evaluation.coefficients_of(name)
        tensors = [getattr(world.statistics, f"{key}_T") for key in coefficients]
        (grad_TV,) = torch.autograd.grad(tensors, world.logits_TV, list(coefficients.values()), retain_graph=True)
        slope[name] = grad_TV.gather(1, world.streams.targets_N[:, None])[:, 0]
    got = values(sign_disagreement(evaluation, world.statistics))
    assert len(got) == 6
    for a, b in [("surrogate", "teacher_kl"), ("surrogate", "teacher_forward_kl"), ("entropy", "teacher_kl")]:
        product_T = slope[a] * slope[b]
        expected = ((product_T < 0).sum() / (product_T != 0).sum()).item()
        assert got[f"disagree/{a}.{b}"] == pytest.approx(expected, rel=1e-6) and 0 < expected < 1


def test_terms_whose_slope_is_unknown_are_left_out():
    world = World()
    assert sign_disagreement(world.evaluate((jsd(), reverse_kl())), world.statistics) == {}
    world.statistics.teacher_logprob_T = None
    got = sign_disagreement(world.evaluate((ClippedSurrogate(), reverse_kl(), entropy())), world.statistics)
    assert set(got) == {"disagree/entropy.surrogate"}


def test_balance_gives_norms_and_cosines_of_the_whole_over_any_split():
    world = World()
    factors = {"surrogate": 1.0, "teacher_kl": 0.5}
    terms = (ClippedSurrogate(), reverse_kl())

    def hidden_gradient(coefficients):
        tensors = [getattr(world.statistics, f"{key}_T") for key in coefficients]
        return torch.autograd.grad(tensors, world.hidden_TH, list(coefficients.values()), retain_graph=True)[0]

    a_TH, b_TH = (hidden_gradient(world.evaluate(terms, factors).coefficients_of(name)) for name in factors)

    def part(start, stop):
        """Of the whole batch's gradient, what rows [start, stop) contribute."""
        inside_T = ((torch.arange(T) >= start) & (torch.arange(T) < stop)).double()
        return lambda coefficients: hidden_gradient({k: c_T * inside_T for k, c_T in coefficients.items()})

    evaluation = world.evaluate(terms, factors)
    parts = [gradient_balance(evaluation, part(*rows)) for rows in ((0, 20), (20, 20), (20, T))]
    got = balance_values(values(merge(parts)) | {"loss": 1.0})
    assert got["gradient/surrogate/norm"] == pytest.approx(a_TH.norm().item())
    assert got["gradient/teacher_kl/norm"] == pytest.approx(b_TH.norm().item())
    cosine = ((a_TH * b_TH).sum() / a_TH.norm() / b_TH.norm()).item()
    assert got["gradient/surrogate.teacher_kl/cosine"] == pytest.approx(cosine)
    dot_T = (a_TH * b_TH).sum(-1)
    assert got["gradient/surrogate.teacher_kl/rows_opposed"] == pytest.approx(
        ((dot_T < 0).sum() / (dot_T != 0).sum()).item()
    )
    assert got["loss"] == 1.0 and not any(key.endswith(("/dot", "/square")) for key in got)
    silent = balance_values({"gradient/a/square": 0.0, "gradient/b/square": 4.0, "gradient/a.b/dot": 0.0})
    assert silent == {"gradient/a/norm": 0.0, "gradient/b/norm": 2.0}

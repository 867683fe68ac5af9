"""Every choice that an objective has, in the trainer at several layouts, against plain autograd on dense float64
logits: the loss, every parameter's gradient, and what the diagnostics say. One launch trains on all cases.

Legend: _R loss tokens of the batch, _RV times vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_update_parity import REWARDS, SIZES, TEMPERATURE, _responses, _trajectories, _with_old_logprobs

from megatron_dgrpo.algorithms.sequence_terms import EntropyWeighted, SequenceSurrogate
from megatron_dgrpo.algorithms.terms import ClippedSurrogate, reverse_kl, statistic
from megatron_dgrpo.config.objective import Objective
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.dense import DenseStatistics
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.tiny import save_tiny_qwen3
from megatron_dgrpo.testing.transformers_reference import as_reference

FLOOR, K, GSPO = -4.5, 7, {"clip_low": 0.02, "clip_high": 0.03}
COSINE = {"kind": "cosine", "start": 1, "end": 0, "steps": 9}
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "jsd": {"divergence": {"kind": "jsd", "alpha": 0.3}},
    "topk_student_tail": {"estimator": {"kind": "topk_student", "k": K}},
    "topk_student_stopgrad": {"estimator": {"kind": "topk_student", "k": K, "rest": "stopgrad"}},
    "topk_teacher_tail": {"estimator": {"kind": "topk_teacher", "k": K}},
    "topk_teacher_stopgrad": {"estimator": {"kind": "topk_teacher", "k": K, "rest": "stopgrad"}},
    "sampled": {"estimator": "sampled"},
    "sampled, baseline, floor": {"estimator": {"kind": "sampled", "baseline": True, "teacher_floor": FLOOR}},
    "k2": {"estimator": "k2"},
    "k3": {"divergence": "forward_kl", "estimator": "k3"},
    "sequence_mean": {"aggregation": "sequence_mean", "advantages": {"kind": "mean"}},
    "token_mean": {"aggregation": "token_mean", "advantages": {"kind": "leave_one_out"}},
    "entropy, dual clip": {"entropy": 0.25, "dual_clip": 1.5, "beta": COSINE},
    "clamp": {"log_ratio_clamp": 0.4, "advantages": {"std": "sample", "epsilon": 0.1}},
    "truncated": {"correction": "truncated"},
    "truncated, live": {"correction": {"kind": "truncated", "cap": 1.5}},
    "truncated sequence": {"correction": {"kind": "truncated", "level": "sequence", "cap": 1.2}},
    "masked": {"correction": {"kind": "masked", "high": 2.5}, "entropy": 0.25},
    "masked, live": {"correction": {"kind": "masked", "low": 0.4, "high": 2.5}},
    "sequence mask": {"correction": {"kind": "sequence_mask", "low": 0.95, "high": 1.05}},
    "sequence mask, live": {"correction": {"kind": "sequence_mask", "ratio": "product", "low": 0.5, "high": 2.0}},
    "sequence terms": {},
    "batch terms": {},
}  # fmt: skip


def engine_gaps(lengths: list[int]) -> list[float]:
    """Old minus engine's log-prob of each loss token: responses that lean to one side, and outliers on both."""
    gaps = []
    for i, length in enumerate(lengths):
        gaps += [(-0.15, 0.0, 0.01, 0.2)[i % 4] + (0.02, 1.1, -0.03, -1.2, 0.0)[(i + t) % 5] for t in range(length)]
    return gaps


def with_engine_logprobs(trajectories, responses):
    """The trajectories with behaviour log-probs, segment by segment."""
    gaps = iter(engine_gaps([sum(r.mask) for r in responses]))
    return [
        replace(
            trajectory,
            segments=tuple(
                replace(s, behaviour_logprobs=np.asarray([x - next(gaps) for x in s.old_logprobs])) if s.trained else s
                for s in trajectory.segments
            ),
        )
        for trajectory in trajectories
    ]


@dataclass(frozen=True, kw_only=True)
class StudentEntropyWeighted(EntropyWeighted):
    """Weights rows by exp(-entropy of the student), mean 1 over the batch."""

    reads: ClassVar[str] = "entropy"

    @property
    def statistics(self) -> tuple[str, ...]:
        return (*self.term.statistics, "entropy")

    def _raw(self, statistics: Any) -> torch.Tensor:
        return torch.exp(-self.beta * statistic(statistics, "entropy"))


def _objective(case: str) -> Objective:
    return Objective.model_validate({"clip_high": 0.28} | CASES[case])


def _train(rank, world, folder, teacher_folder, trajectories, rewards, layout, budget):
    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams, head_options
    from megatron_dgrpo.algorithms.losses import Loss
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.teachers import Lesson
    from megatron_dgrpo.train.update import Work, compute_gradients

    groups = Groups(**layout)
    groups.seed(0)
    models = {"groups": groups, "options": BuildOptions(torch.float64, sequence_parallel=groups.grid.tp > 1)}
    student = load_student(folder, **models)
    teacher = load_teacher(teacher_folder, **models, student_spec=read_spec(folder), student_groups=groups)
    grown, packing = trees(trajectories), Packing(budget, dp=groups.grid.dp, cp=groups.grid.cp, multiple_of=4)
    layouts = packing.micro_batches(grown, rank=groups.grid.coordinate("dp"), cp_rank=groups.grid.coordinate("cp"))
    rows = teacher.rows(grown, packing)
    found = {}
    for case in CASES:
        objective = _objective(case)
        loss, factors = dgrpo_loss(objective)
        if case == "sequence terms":
            loss = Loss((SequenceSurrogate(**GSPO), reverse_kl()))
        elif case == "batch terms":
            loss = Loss((ClippedSurrogate(clip_high=0.28), StudentEntropyWeighted(term=reverse_kl(), beta=0.7)))
        streams = dgrpo_streams(trajectories, rewards, objective).streams
        if case.endswith(", live"):  # one update per batch: the old policy is the live one
            streams = replace(streams, old_logprobs_N=None)
        options = head_options(objective)
        lessons = [Lesson("teacher", teacher.head, rows)]
        work = Work(layouts, streams, loss, factors, TEMPERATURE, lessons, head_options=options, balance=True)
        metrics = compute_gradients(student, work)
        gather_data_parallel_gradients(student.wrapped)
        found[case] = metrics, pieces(student.decoder, "main_grad")
    return found


class Dense:
    """The batch through the reference models: each loss token's logits, and the objective's terms by autograd."""

    def __init__(self, responses, student, teacher) -> None:
        self.student, self.responses = student, responses
        hidden, logits, teacher_logits, targets, samples, old = [], [], [], [], [], []
        for i, r in enumerate(responses):
            ids = torch.tensor([[*r.prompt, *r.tokens]])
            at = [len(r.prompt) + t - 1 for t in range(len(r.tokens)) if r.mask[t]]
            hidden.append(student.model(ids).last_hidden_state[0, at])
            logits.append(student.lm_head(hidden[-1]))
            teacher_logits.append(teacher(ids).logits[0, at].detach())
            targets += [t for t, trained in zip(r.tokens, r.mask, strict=True) if trained]
            old += [x for x, trained in zip(r.old_logprobs, r.mask, strict=True) if trained]
            samples += [i] * len(at)
        self.hidden, self.logits_RV = hidden, torch.cat(logits)
        self.teacher_RV, self.targets_R = torch.cat(teacher_logits), torch.tensor(targets)
        self.sample_R, self.old_R = torch.tensor(samples), torch.tensor(old, dtype=torch.float64)
        gaps = engine_gaps(self.sample_R.bincount().tolist())
        self.behaviour_R = self.old_R - torch.tensor(gaps, dtype=torch.float64)

    def statistics(self, alpha: float) -> DenseStatistics:
        return DenseStatistics.of(self.logits_RV, self.teacher_RV, self.targets_R, temperature=TEMPERATURE, alpha=alpha)

    def per_response(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[self.sample_R]

    def weights(self, aggregation: str) -> torch.Tensor:
        lengths = [sum(r.mask) for r in self.responses]
        if aggregation == "token_mean":
            return self.per_response([1 / sum(lengths)] * len(lengths))
        if aggregation == "sequence_mean":
            return self.per_response([1 / len(lengths) / n for n in lengths])
        sizes = [len(REWARDS[r.group]) for r in self.responses]
        return self.per_response([1 / len(REWARDS) / g / n for g, n in zip(sizes, lengths, strict=True)])

    def advantages(self, kind: str, std: str, epsilon: float) -> torch.Tensor:
        values = []
        for r in self.responses:
            group = REWARDS[r.group]
            if len(group) == 1:  # nobody to compare with
                values.append(0.0)
            elif kind == "leave_one_out":
                others = (sum(group) - r.reward) / (len(group) - 1)
                values.append(r.reward - others)
            else:
                scale = np.std(group, ddof=std == "sample") + epsilon if kind == "std" else 1.0
                values.append((r.reward - np.mean(group)) / scale if np.ptp(group) else 0.0)
        return self.per_response(values)

    def terms(self, case: str) -> dict[str, torch.Tensor]:
        """Factor x loss of each term. Its gradient is the trained one; of `sampled`, its value is not."""
        o = _objective(case)
        s = self.statistics(getattr(o.divergence, "alpha", 0.5))
        old_R = s.logprob_T.detach() if case.endswith(", live") else self.old_R
        weights_R, log_R = self.weights(o.aggregation), s.logprob_T - old_R
        advantage_R = self.advantages(o.advantages.kind, o.advantages.std, o.advantages.epsilon)
        beta = getattr(o.beta, "value", 1.0)
        correction_R = self.correction(o.correction, old_R - self.behaviour_R)
        found = {"surrogate": (weights_R * correction_R * self._surrogate(case, o, log_R, advantage_R)).sum()}
        kl_R = self._divergence(o, s)
        if case == "batch terms":
            raw_R = torch.exp(-0.7 * s.entropy_T).detach()
            kl_R = kl_R * raw_R / raw_R.mean()
        name = (
            "teacher_jsd"
            if case == "jsd"
            else "teacher_forward_kl"
            if o.divergence.kind != "reverse_kl"
            else "teacher_kl"
        )
        found[name] = beta * (weights_R * kl_R).sum()
        if o.uses_entropy:
            found["entropy"] = -0.25 * (weights_R * s.entropy_T).sum()
        return found

    def correction(self, by, log_R) -> torch.Tensor:
        """Weights by ratios of probabilities, response by response; each kind touches some and leaves some."""
        weight_R, touched_R = torch.ones_like(log_R), torch.ones_like(log_R, dtype=torch.bool)
        if by is None:
            return weight_R
        for i in range(len(self.responses)):
            of_i = self.sample_R == i
            ratios = log_R[of_i].exp()
            if by.kind == "masked":
                keep = (ratios >= by.low) & (ratios <= by.high)
                weight_R[of_i], touched_R[of_i] = ratios * keep, ~keep
            elif by.kind == "truncated":
                of_all = ratios if by.level == "token" else ratios.prod()
                weight_R[of_i], touched_R[of_i] = of_all.clamp(max=by.cap), of_all > by.cap
            else:
                of_all = ratios.prod() if by.ratio == "product" else ratios.prod() ** (1 / len(ratios))
                weight_R[of_i], touched_R[of_i] = float(by.low <= of_all <= by.high), not by.low <= of_all <= by.high
        assert 0.1 < touched_R.double().mean() < 0.9
        self.touched_R = touched_R
        return weight_R

    def _surrogate(self, case, o, log_R, advantage_R) -> torch.Tensor:
        if case == "sequence terms":
            count = len(self.responses)
            sums = torch.zeros(count, dtype=torch.float64).index_add(0, self.sample_R, log_R)
            ratio_R = (sums / torch.bincount(self.sample_R)).exp()[self.sample_R]
            low, high = 1 - GSPO["clip_low"], 1 + GSPO["clip_high"]
            for sign_R in (advantage_R > 0, advantage_R < 0):
                assert (sign_R & (ratio_R > high)).any() and (sign_R & (ratio_R < low)).any()
        else:
            ratio_R = log_R.clamp(-o.log_ratio_clamp, o.log_ratio_clamp).exp()
            low, high = 1 - o.clip_low, 1 + o.clip_high
        gain_R = torch.minimum(ratio_R * advantage_R, ratio_R.clamp(low, high) * advantage_R)
        if o.dual_clip is not None:
            gain_R = torch.where(advantage_R < 0, torch.maximum(gain_R, o.dual_clip * advantage_R), gain_R)
        return -gain_R

    def _divergence(self, o, s) -> torch.Tensor:
        estimator = o.estimator
        if estimator.kind == "exact":
            return {"reverse_kl": s.kl_T, "forward_kl": s.forward_kl_T, "jsd": s.jsd_T}[o.divergence.kind]
        if estimator.kind.startswith("topk"):
            l_RV, r_RV = (torch.log_softmax(x / TEMPERATURE, -1) for x in (self.logits_RV, self.teacher_RV))
            support_RK = (l_RV if estimator.kind == "topk_student" else r_RV).topk(K).indices
            l_RK, r_RK = l_RV.gather(1, support_RK), r_RV.gather(1, support_RK)
            if estimator.rest == "stopgrad":
                return (l_RK.exp() * (l_RK - r_RK).detach()).sum(-1)
            left_R, teacher_left_R = 1 - l_RK.exp().sum(-1), 1 - r_RK.exp().sum(-1)
            return (l_RK.exp() * (l_RK - r_RK)).sum(-1) + left_R * (left_R / teacher_left_R).log()
        teacher_R = s.teacher_logprob_T
        if estimator.teacher_floor is not None:
            assert 0.1 < (teacher_R < FLOOR).double().mean() < 0.9
            teacher_R = teacher_R.clamp(min=FLOOR)
        ratio_R, k1_R = (s.logprob_T - self.old_R).exp().detach(), s.logprob_T - teacher_R
        if estimator.kind == "sampled":
            baseline_R = s.kl_T.detach() if estimator.baseline else 0.0
            return ratio_R * (k1_R.detach() - baseline_R) * s.logprob_T
        return ratio_R * (k1_R.square() / 2 if estimator.kind == "k2" else (-k1_R).exp() - 1 + k1_R)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dense, Path]:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_qwen3(folder / "student", tied=True, seed=1, **SIZES)
    save_tiny_qwen3(folder / "teacher", tied=False, hidden=96, layers=3, seed=2, **SIZES)
    student, teacher = (as_reference(folder / name, torch.float64) for name in ("student", "teacher"))
    models = [lambda ids, model=model: model(ids[None]).logits[0] for model in (student, teacher)]
    return Dense(_with_old_logprobs(_responses(), *models), student, teacher), folder


LAYOUTS = [
    pytest.param(({"tp": 2, "dp": 1}, 64), id="tp2"),
    pytest.param(({"tp": 2, "dp": 2}, 32), id="tp2 dp2"),
    pytest.param(({"tp": 1, "dp": 2, "pp": 2}, 32), id="dp2 pp2"),
    pytest.param(({"tp": 1, "cp": 2, "dp": 2}, 32), id="cp2 dp2"),
]


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(dense: tuple[Dense, Path], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    reference, folder = dense
    responses, (layout, budget) = reference.responses, request.param
    trajectories = with_engine_logprobs(_trajectories(responses), responses)
    arguments = (str(folder / "student"), str(folder / "teacher"), trajectories)
    rewards, world = [r.reward for r in responses], int(np.prod(list(layout.values())))
    return run_distributed(_train, world, *arguments, rewards, layout, budget, timeout_s=240)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_dense_autograd(trained, dense, case: str) -> None:
    reference, _ = dense
    terms = reference.terms(case)
    parameters = dict(reference.student.named_parameters())
    expected = torch.autograd.grad(sum(terms.values()), list(parameters.values()), retain_graph=True)
    gradients = whole((ranks[case][1] for ranks in trained), tolerance=1e-10)
    for name, gradient in zip(parameters, expected, strict=True):
        assert relative_error(gradients[name], gradient) <= 1e-10, name
    for ranks in trained:
        metrics = ranks[case][0]
        if "sampled" not in case:
            assert metrics["loss"] == pytest.approx(sum(terms.values()).item(), rel=1e-10)
        if _objective(case).correction is not None:
            touched_R = reference.touched_R.double()
            assert metrics["correction/tokens"] == pytest.approx(touched_R.mean().item())
            if "sequence" in case:
                each = [touched_R[reference.sample_R == i].mean().item() for i in range(len(reference.responses))]
                assert metrics["correction/sequences"] == pytest.approx(np.mean(each))
        elif case != "batch terms":
            assert all(metrics[f"{name}/weight"] == pytest.approx(1.0) for name in terms)


@pytest.mark.parametrize("case", CASES)
def test_the_balance_of_the_terms_is_that_of_their_dense_gradients(trained, dense, case: str) -> None:
    reference, _ = dense
    terms = reference.terms(case)
    gradient = {
        name: torch.cat(torch.autograd.grad(loss, reference.hidden, retain_graph=True)) for name, loss in terms.items()
    }
    metrics = trained[0][case][0]
    for name in terms:
        assert metrics[f"gradient/{name}/norm"] == pytest.approx(gradient[name].norm().item(), rel=1e-9)
    names = sorted(terms)
    for a, b in zip(names, names[1:], strict=False):
        cosine = (gradient[a] * gradient[b]).sum() / (gradient[a].norm() * gradient[b].norm())
        assert metrics[f"gradient/{a}.{b}/cosine"] == pytest.approx(cosine.item(), abs=1e-9)
        opposed_R = (gradient[a] * gradient[b]).sum(-1)
        share = (opposed_R < 0).sum() / (opposed_R != 0).sum()
        assert metrics[f"gradient/{a}.{b}/rows_opposed"] == pytest.approx(share.item())


def test_figures_by_position_and_signs(trained, dense) -> None:
    reference, _ = dense
    metrics, s = trained[0]["forward_kl"][0], reference.statistics(0.5)
    assert metrics["row/kl@0"] == pytest.approx(s.kl_T.mean().item())
    for name in ("row/entropy@0", "policy/entropy"):
        assert metrics[name] == pytest.approx(s.entropy_T.mean().item())
    assert metrics["row/teacher_mass@0"] == pytest.approx(s.teacher_logprob_T.exp().mean().item())
    assert metrics["tokens@0"] == 1.0 and "row/kl@1024" not in metrics
    slopes = [
        torch.autograd.grad(loss, reference.logits_RV, retain_graph=True)[0].gather(1, reference.targets_R[:, None])
        for loss in reference.terms("forward_kl").values()
    ]
    both = (slopes[0] * slopes[1]) != 0
    share = ((slopes[0] * slopes[1]) < 0).sum() / both.sum()
    assert metrics["disagree/surrogate.teacher_forward_kl"] == pytest.approx(share.item())
    assert 0 < trained[0]["topk_teacher_tail"][0]["row/topk_teacher_mass@0"] < 1

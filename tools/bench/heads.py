"""Time and memory of the heads: both modes, against bare matrix products, a plain loss, Liger's and TRL's.

    python tools/bench/heads.py            the CPU case, with targets (minutes)
    python tools/bench/heads.py --quick    the same on a small problem, without targets on time (under a minute)
    python tools/bench/heads.py --device cuda

The loss is dGRPO's: the clipped surrogate plus 0.5 x KL(student || teacher), gradients to hidden states and head. Each
case runs in a fresh process, and the cases take turns, so that a busy machine slows all of them; a case's time is its
best round, its memory that of a round of its own. The floor of a mode is its matrix products and nothing else, in the
fastest of some shapes. Peers are measured where they are installed (`liger-kernel`, `trl`); Liger's and TRL's are two
losses, one for either term.

Legend: _T rows, _V vocabulary, _H hidden size of the student, _I of the teacher, _C rows of a chunk.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import torch
from _measure import Report, in_fresh_process, limit_memory, measured
from torch import Tensor

from megatron_dgrpo.algorithms.losses import Loss, attach
from megatron_dgrpo.algorithms.streams import Streams
from megatron_dgrpo.algorithms.terms import ClippedSurrogate, reverse_kl
from megatron_dgrpo.heads import HeadShard, row_statistics, row_statistics_with_gradients

BETA, CLIP, TEMPERATURE = 0.5, 0.2, 0.9
PEERS = ("liger", "trl")
CASES = ("recompute", "in_forward", "floor_recompute", "floor_in_forward", "plain", *PEERS)


@dataclass(frozen=True)
class Size:
    rows: int
    vocabulary: int
    hidden: int
    teacher_hidden: int


@dataclass
class Problem:
    hidden_TH: Tensor
    weight_VH: Tensor
    teacher_TI: Tensor
    teacher_VI: Tensor
    streams: Streams

    @classmethod
    def make(cls, size: Size, device: str) -> Problem:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
        targets_T = torch.randint(0, size.vocabulary, (size.rows,), device=device)
        one_T = torch.full((size.rows,), 1 / size.rows, device=device)
        streams = Streams(
            targets_N=targets_T,
            sample_N=torch.zeros_like(targets_T),
            position_N=torch.arange(size.rows, device=device),
            weights={"surrogate": one_T, "teacher_kl": one_T},
            advantages_N=torch.randn(size.rows, device=device),
            old_logprobs_N=torch.full((size.rows,), -10.5, device=device),
        )
        return cls(
            normal(size.rows, size.hidden).requires_grad_(),
            normal(size.vocabulary, size.hidden).mul_(0.05).requires_grad_(),
            normal(size.rows, size.teacher_hidden),
            normal(size.vocabulary, size.teacher_hidden).mul_(0.05),
            streams,
        )

    def rows(self, count: int) -> Problem:
        """The first rows, for warming up."""
        hidden_TH = self.hidden_TH.detach()[:count].clone().requires_grad_()
        index = torch.arange(count, device=hidden_TH.device)
        weight_VH, teacher_TI = self.weight_VH.detach().requires_grad_(), self.teacher_TI[:count]
        return Problem(hidden_TH, weight_VH, teacher_TI, self.teacher_VI, self.streams.select(index))


def heads(problem: Problem, mode: str) -> None:
    loss = Loss((ClippedSurrogate(clip_low=CLIP, clip_high=CLIP), reverse_kl()))
    factors = {"surrogate": 1.0, "teacher_kl": BETA}
    vocabulary = len(problem.weight_VH)
    first = problem.hidden_TH, HeadShard(problem.weight_VH, 0, vocabulary), problem.streams.targets_N
    teacher_head = HeadShard(problem.teacher_VI, 0, vocabulary)
    if mode == "recompute":
        out = row_statistics(
            *first,
            temperature=TEMPERATURE,
            group=None,
            teacher_hidden_TH=problem.teacher_TI,
            teacher_head=teacher_head,
            want=["logprob", "kl"],
        )
        attach(loss.evaluate(out, problem.streams, factors), out).backward()
        return
    row_T = torch.arange(len(problem.hidden_TH), device=problem.hidden_TH.device)
    _, carrier = row_statistics_with_gradients(
        *first,
        temperature=TEMPERATURE,
        group=None,
        teacher_hidden_TH=problem.teacher_TI,
        teacher_head=teacher_head,
        want=["logprob", "kl"],
        coefficients=lambda part, at: loss.evaluate(part, problem.streams.select(row_T[at]), factors).coefficients,
    )
    carrier.backward()


def surrogate(logprob_T: Tensor, streams: Streams) -> Tensor:
    assert streams.old_logprobs_N is not None and streams.advantages_N is not None
    ratio_T = (logprob_T - streams.old_logprobs_N).exp()
    clipped_T = ratio_T.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio_T * streams.advantages_N, clipped_T * streams.advantages_N).mean()


def plain(problem: Problem) -> None:
    """What a trainer writes that holds logits: float32 logits of both models, whole."""
    logp_TV = torch.log_softmax((problem.hidden_TH @ problem.weight_VH.t()).float() / TEMPERATURE, -1)
    with torch.no_grad():
        logq_TV = torch.log_softmax((problem.teacher_TI @ problem.teacher_VI.t()).float() / TEMPERATURE, -1)
    logprob_T = logp_TV.gather(1, problem.streams.targets_N[:, None])[:, 0]
    kl_T = torch.nn.functional.kl_div(logq_TV, logp_TV, reduction="none", log_target=True).sum(1)
    (surrogate(logprob_T, problem.streams) + BETA * kl_T.mean()).backward()


def liger(problem: Problem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss  # type: ignore

    streams = problem.streams
    rows, size = problem.hidden_TH.shape
    sequences = min(8, rows)
    of_sequences = lambda x_T: x_T.view(sequences, -1)  # noqa: E731
    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", temperature=TEMPERATURE
    )
    first = grpo(
        problem.hidden_TH.view(sequences, -1, size),
        problem.weight_VH,
        of_sequences(streams.targets_N),
        torch.ones(sequences, rows // sequences, device=problem.hidden_TH.device),
        of_sequences(streams.advantages_N)[:, 0],
        old_per_token_logps=of_sequences(streams.old_logprobs_N),
    )[0]
    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, temperature=TEMPERATURE, compiled=False
    )
    second = jsd(problem.hidden_TH, problem.weight_VH, problem.teacher_TI, problem.teacher_VI, streams.targets_N)
    (first + BETA * second).backward()


def trl(problem: Problem) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # type: ignore
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # type: ignore

    logprob_T = ChunkedLogProbFunction.apply(
        problem.hidden_TH, problem.weight_VH, None, problem.streams.targets_N, TEMPERATURE, 8192, None, 1.0, ()
    )[0]
    kl_T = ChunkedDivergenceFunction.apply(
        problem.hidden_TH, problem.weight_VH, None, problem.teacher_TI, problem.teacher_VI, None, 1.0, TEMPERATURE
    )[0]
    (surrogate(logprob_T, problem.streams) + BETA * kl_T.mean()).backward()


def floor(problem: Problem, mode: str, shape: tuple[int, int]) -> None:
    """(8H + 4I) T V operations for recompute, (6H + 2I) T V for gradient in forward: products alone."""
    hidden_TH, weight_VH = problem.hidden_TH.detach(), problem.weight_VH.detach()
    hidden_grad_TH, weight_grad_VH = torch.zeros_like(hidden_TH), torch.zeros_like(weight_VH)
    rows, columns = shape
    new = lambda: torch.empty(rows * columns, device=hidden_TH.device, dtype=hidden_TH.dtype)  # noqa: E731
    a, b = new(), new()
    for hidden_CH, grad_CH, teacher_CI in zip(
        hidden_TH.split(rows), hidden_grad_TH.split(rows), problem.teacher_TI.split(rows), strict=True
    ):
        for at in range(0, len(weight_VH), columns):
            tile_VH, tile_VI = weight_VH[at : at + columns], problem.teacher_VI[at : at + columns]
            out_CV, teacher_CV = (x[: len(hidden_CH) * len(tile_VH)].view(len(hidden_CH), -1) for x in (a, b))
            for _ in range(2 if mode == "recompute" else 1):
                torch.mm(teacher_CI, tile_VI.t(), out=teacher_CV)
                torch.mm(hidden_CH, tile_VH.t(), out=out_CV)
            grad_CH.addmm_(out_CV, tile_VH)
            weight_grad_VH[at : at + columns].addmm_(out_CV.t(), hidden_CH)


def shapes_of_floor(device: str, vocabulary: int) -> list[tuple[int, int]]:
    shapes = (
        [(4096, 8192), (8192, 8192), (4096, 16384)] if device == "cuda" else [(512, 1024), (1024, 1024), (512, 4096)]
    )
    return [(rows, min(columns, vocabulary)) for rows, columns in shapes]


def run_case(name: str, size: Size, device: str, rounds: int) -> dict[str, float]:
    """In a process of its own: a small warm-up, then whole runs."""
    problem = Problem.make(size, device)
    calls = {
        "recompute": [lambda p: heads(p, "recompute")],
        "in_forward": [lambda p: heads(p, "in_forward")],
        "plain": [plain],
        "liger": [liger],
        "trl": [trl],
    }
    for mode in ("recompute", "in_forward"):
        calls[f"floor_{mode}"] = [
            lambda p, mode=mode, shape=shape: floor(p, mode, shape)  # type: ignore[misc]
            for shape in shapes_of_floor(device, size.vocabulary)
        ]
    results = []
    for call in calls[name]:
        call(problem.rows(min(64, size.rows)))
        for _ in range(rounds):
            problem.hidden_TH.grad = problem.weight_VH.grad = None
            results.append(measured(device, lambda call=call: call(problem)))  # type: ignore[misc]
    return {"seconds": min(r["seconds"] for r in results), "bytes": results[0]["bytes"]}


def child(arguments: argparse.Namespace) -> None:
    if arguments.limit:
        limit_memory(arguments.limit)
    size = Size(*map(int, arguments.size.split(",")))
    print(json.dumps(run_case(arguments.case, size, arguments.device, arguments.repeat)))


def measure(names: tuple[str, ...], size: Size, options: argparse.Namespace, rounds: int, limit: int = 0) -> dict:
    """The cases in turns; of each its best time, and its memory."""
    best: dict[str, dict] = {}
    text = f"{size.rows},{size.vocabulary},{size.hidden},{size.teacher_hidden}"
    repeat = 3 if options.device == "cuda" else 1
    arguments = ["--size", text, "--device", options.device, "--repeat", str(repeat), "--limit", str(limit), "--case"]
    for turn in range(rounds + 1):
        for name in names:
            if "error" in best.get(name, {}):
                continue
            first = turn == 0
            got = in_fresh_process([*arguments, name], threads=options.threads, return_memory=first)
            if "error" in got or first:
                best[name] = got
            else:
                seconds = got["seconds"] if turn == 1 else min(got["seconds"], best[name]["seconds"])
                best[name] = {"seconds": seconds, "bytes": best[name]["bytes"]}
    return best


def ratio(of: dict, to: dict, key: str) -> float | None:
    return None if key not in of or key not in to or not to[key] else of[key] / to[key]


def compare(report: Report, size: Size, options: argparse.Namespace) -> None:
    """Time and memory at one size."""
    best = measure(CASES, size, options, rounds=0 if options.quick else options.rounds)
    for name, values in best.items():
        report.line(name, **vars(size), **values)
    timed = not options.quick
    for mode in ("recompute", "in_forward"):
        ours = best[mode]
        if options.device == "cuda":
            share = ratio(best[f"floor_{mode}"], ours, "seconds")
            report.line(f"{mode}: share of the bare rate", ratio=share, target=0.85, at_most=False)
            continue
        to_floor = ratio(ours, best[f"floor_{mode}"], "seconds")
        report.line(f"{mode}: time to floor", ratio=to_floor, target=1.2 if timed else None)
        to_plain = ratio(ours, best["plain"], "bytes")
        report.line(f"{mode}: memory to plain", ratio=to_plain, target=1 / 8 if timed else None)
        if "error" not in best["liger"]:
            to_liger = ratio(ours, best["liger"], "bytes")
            report.line(f"{mode}: memory to Liger", ratio=to_liger, target=0.6 if timed else None)
    if options.device == "cpu" and "error" not in best["liger"]:
        faster = min(("recompute", "in_forward"), key=lambda mode: best[mode]["seconds"])
        speed = ratio(best["liger"], best[faster], "seconds")
        report.line(f"{faster}: faster than Liger", ratio=speed, target=1.6 if timed else None, at_most=False)


def growth(report: Report, size: Size, options: argparse.Namespace) -> None:
    """Memory at two numbers of rows: what a row costs is its hidden gradient and a few numbers."""
    few, many = size, Size(4 * size.rows, size.vocabulary, size.hidden, size.teacher_hidden)
    element = 2 if options.device == "cuda" else 4
    for mode in ("recompute", "in_forward"):
        small, large = (measure((mode,), each, options, rounds=0)[mode] for each in (few, many))
        if "error" in small or "error" in large:
            report.line(f"{mode}: growth", target=1.0, error=[small, large])
            continue
        per_row = (large["bytes"] - small["bytes"]) / (many.rows - few.rows)
        allowed = 1.15 * size.hidden * element + 64
        report.line(f"{mode}: memory per row", bytes=per_row, allowed=allowed, ratio=per_row / allowed, target=1.0)


def beyond_plain(report: Report, size: Size, options: argparse.Namespace) -> None:
    """A size whose logits alone are several times the memory that either loss is given."""
    limit = 4 * 2**30
    best = measure(("recompute", "in_forward", "plain"), size, options, rounds=0, limit=limit)
    for mode in ("recompute", "in_forward"):
        fits = 1.0 if "error" not in best[mode] else None
        report.line(f"{mode}: large", **vars(size), limit=limit, **best[mode], ratio=fits, target=1.0)
    refused = 1.0 if "error" in best["plain"] else None
    report.line("plain: large, must fail", **vars(size), limit=limit, **best["plain"], ratio=refused, target=1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small problem, under a minute, no targets on time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        child(options)
        return 0
    report = Report()
    if options.device == "cuda":
        compare(report, Size(8192, 151_936, 2048, 5120), options)
        whole = measure(("recompute",), Size(131_072, 151_936, 2048, 5120), options, rounds=1)["recompute"]
        fits = 1.0 if "error" not in whole else None
        report.line("recompute: 131,072 rows in one step", **whole, ratio=fits, target=1.0)
        growth(report, Size(8192, 151_936, 2048, 5120), options)
    elif options.quick:
        compare(report, Size(512, 8192, 256, 384), options)
        growth(report, Size(4096, 2048, 256, 384), options)
    else:
        compare(report, Size(4096, 32_768, 512, 768), options)
        growth(report, Size(4096, 8192, 512, 768), options)
        beyond_plain(report, Size(8192, 151_936, 256, 384), options)
    return report.exit_status


if __name__ == "__main__":
    raise SystemExit(main())

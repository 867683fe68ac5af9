"""Trees against packed copies of the prompt, and context parallelism. One JSON line per case; status 1 on a miss.

    python tools/bench/tree.py [--quick] [--long]

Speed: a student step, a teacher's forward and a log-prob pass, over trees and over documents that repeat the prompt, in
turns, the best of some. Both run the same flash operator, without masks: copies are one causal call each. `predicted`
is the ratio of their FLOPs. With `--long`: one step of a 32,768-token prompt with 8 responses of 256 tokens at TP2CP2,
and its memory at 8k, 16k and 32k.

Memory is the growth of a rank's peak resident set on CPU, and the allocator's peak on CUDA. Bytes sent are counted at
the collectives; the formula is 3 (forward, backward, gradients) x layers x (cp - 1) x shared tokens x keys and values.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

MODEL = {"vocab_size": 512, "hidden": 256, "layers": 2, "heads": 8, "kv_heads": 2, "intermediate": 768}
ON_CUDA = {"vocab_size": 32768, "hidden": 2048, "layers": 4, "heads": 16, "kv_heads": 8, "head_dim": 128,
           "intermediate": 6144}  # fmt: skip
TINY = {"vocab_size": 128, "hidden": 64, "layers": 2, "heads": 2, "kv_heads": 2, "intermediate": 128}


def group(prompt: int, response: int, size: int, vocab: int) -> list[Trajectory]:
    draw = np.random.default_rng(0)
    ids = lambda n: np.asarray(draw.integers(0, vocab, n))  # noqa: E731
    tokens = ids(prompt)
    return [
        Trajectory("prompt", i, tokens, (Segment(ids(response), True, np.full(response, -3.0)),), "stop")
        for i in range(size)
    ]


class Step:
    """A model as student and as its own teacher, and what a step does with them."""

    def __init__(self, folder: str, *, tp: int = 1, cp: int = 1, dtype: str = "float32") -> None:
        import torch

        from megatron_dgrpo.model.megatron_config import BuildOptions
        from megatron_dgrpo.parallel.groups import Groups
        from megatron_dgrpo.teacher.frozen import load_teacher
        from megatron_dgrpo.train.student import load_student

        self.groups = Groups(tp=tp, cp=cp, dp=1)
        self.groups.seed(0)
        options = BuildOptions(getattr(torch, dtype), sequence_parallel=tp > 1)
        self.student = load_student(folder, groups=self.groups, options=options)
        self.spec = self.student.decoder.spec
        self.teacher = load_teacher(
            folder, groups=self.groups, options=options, student_spec=self.spec, student_groups=self.groups
        )

    def prepare(self, trajectories: list[Trajectory], *, shared: bool, max_tokens: int) -> tuple[Any, Any]:
        """An update's work, and how to have the teacher score it."""
        from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
        from megatron_dgrpo.config.schema import Objective
        from megatron_dgrpo.model.flops import training_cost
        from megatron_dgrpo.packing.pack import Packing
        from megatron_dgrpo.packing.trees import documents, trees
        from megatron_dgrpo.train.teachers import Lesson
        from megatron_dgrpo.train.update import Work

        grid = self.groups.grid
        grown = (trees if shared else documents)(trajectories)
        packing = Packing(max_tokens, cp=grid.cp, multiple_of=grid.tp, cost=training_cost(self.spec))
        layouts = packing.micro_batches(grown, cp_rank=grid.coordinate("cp"))
        rewards = [float(i % 2) for i in range(len(trajectories))]
        streams = dgrpo_streams(trajectories, rewards, Objective()).streams
        loss, factors = dgrpo_loss(Objective())
        work = Work(layouts, streams, loss, factors, 1.0)

        def teach() -> Any:
            return replace(work, lessons=[Lesson("teacher", self.teacher.head, self.teacher.rows(grown, packing))])

        return work, teach


def _seconds(action: Any, *, alone: bool = False) -> float:
    """On a GPU and of several ranks the wall's time; of one thread that runs `alone` the processor's."""
    import torch

    on_cuda = torch.cuda.is_available()
    sync = torch.cuda.synchronize if on_cuda else lambda: None
    clock = time.process_time if alone and not on_cuda else time.perf_counter
    sync()
    start = clock()
    action()
    sync()
    return clock() - start


def _speed(rank: int, world: int, folder: str, prompt: int, response: int, size: int, vocab: int, repeats: int) -> Any:
    """Best seconds of each pass over trees and over copies, and the FLOPs of both."""
    import torch

    from megatron_dgrpo.model.flops import forward_cost, training_cost
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.train.update import compute_gradients, old_logprobs

    step = Step(folder, dtype="bfloat16" if torch.cuda.is_available() else "float32")
    trajectories = group(prompt, response, size, vocab)
    room = prompt + size * response
    forms = {shared: step.prepare(trajectories, shared=shared, max_tokens=room) for shared in (True, False)}
    taught = {shared: teach() for shared, (_, teach) in forms.items()}
    passes = {
        "student step": lambda shared: compute_gradients(step.student, taught[shared]),
        "teacher forward": lambda shared: forms[shared][1](),
        "log-prob pass": lambda shared: old_logprobs(step.student, forms[shared][0]),
    }
    spec = step.spec
    (tree,) = trees(trajectories)
    found = {}
    for name, run in passes.items():
        cost = training_cost(spec) if name == "student step" else forward_cost(spec)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for shared in (True, False):
                times[shared].append(_seconds(lambda r=run, s=shared: r(s), alone=True))
        found[name] = min(times[True]), min(times[False]), cost.of_copies(tree) / cost.of(tree)
    return found


def speed(prompt: int, response: int, size: int, repeats: int, on_cuda: bool) -> bool:
    sizes = ON_CUDA if on_cuda else MODEL
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_qwen3(Path(folder), max_positions=prompt + response, **sizes)  # type: ignore[arg-type]
        case = (str(path), prompt, response, size, sizes["vocab_size"], repeats)
        (found,) = run_distributed(_speed, 1, *case, timeout_s=3000)
    good = True
    for name, (tree, copies, predicted) in found.items():
        ratio = copies / tree
        share, least = ratio / predicted, 4.0 if (prompt, size) == (16 * response, 8) else 0.0
        ok = (share >= 0.85 or prompt < 2048) and ratio >= least
        good &= ok
        print(json.dumps({
            "name": f"{name}, P={prompt} R={response} G={size}", "tree_s": round(tree, 3),
            "copies_s": round(copies, 3), "ratio": round(ratio, 2), "predicted": round(predicted, 2),
            "of_predicted": round(share, 3), "target": f"0.85 of predicted{', 4' if least else ''}", "ok": ok,
        }), flush=True)  # fmt: skip
    return good


def _peak(reset: bool = False) -> int:
    """Peak resident bytes of this process since the last reset."""
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _memory(rank: int, world: int, folder: str, prompt: int, response: int, size: int, tp: int, cp: int) -> Any:
    """Seconds, growth of the peak, bytes sent and the largest gathered piece, of one step."""
    import torch.distributed as dist

    from megatron_dgrpo.train.update import compute_gradients

    step = Step(folder, tp=tp, cp=cp)
    _, teach = step.prepare(group(prompt, response, size, 128), shared=True, max_tokens=prompt + size * response)
    sent, largest = 0, 0
    collectives: Any = dist
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def gathering(out: Any, own: Any, group: Any, async_op: bool = False) -> Any:
        nonlocal sent, largest
        if group is step.groups.collection.cp:
            sent, largest = sent + own.nbytes * (cp - 1), max(largest, out.nbytes)
        return gather(out, own, group=group, async_op=async_op)

    def scattering(own: Any, out: Any, group: Any, async_op: bool = False) -> Any:
        nonlocal sent
        sent += own.nbytes * (cp - 1) if group is step.groups.collection.cp else 0
        return scatter(own, out, group=group, async_op=async_op)

    work = teach()
    before = _peak(reset=True)
    collectives.all_gather_into_tensor, collectives.reduce_scatter_tensor = gathering, scattering
    try:
        seconds = _seconds(lambda: compute_gradients(step.student, work))
    finally:
        collectives.all_gather_into_tensor, collectives.reduce_scatter_tensor = gather, scatter
    spec = step.spec
    shared = -(-prompt // cp) if cp > 1 else 0
    formula = 3 * spec.num_layers * (cp - 1) * shared * 2 * spec.num_kv_heads // tp * spec.head_dim * 4
    return seconds, _peak() - before, sent, formula, largest


def memory(prompt: int, response: int, size: int, tp: int, cp: int) -> tuple[bool, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_qwen3(Path(folder), max_positions=prompt + response, **TINY)  # type: ignore[arg-type]
        ranks = run_distributed(_memory, tp * cp, str(path), prompt, response, size, tp, cp, timeout_s=3000)
    seconds, grown, sent, formula, largest = (max(values) for values in zip(*ranks, strict=True))
    ratio = sent / formula if formula else 1.0
    ok = ratio <= 1.1
    print(json.dumps({
        "name": f"step at tp{tp} cp{cp}, P={prompt} R={response} G={size}", "seconds": round(seconds, 2),
        "peak_mib": round(grown / 2**20, 1), "gathered_mib": round(largest / 2**20, 2), "sent_bytes": sent,
        "formula_bytes": formula, "ratio": round(ratio, 3), "target": 1.1, "ok": ok,
    }), flush=True)  # fmt: skip
    return ok, grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case of each kind")
    parser.add_argument("--long", action="store_true", help="the 32,768-token step at TP2CP2")
    parser.add_argument("--cuda", action="store_true", help="prompts of 32k and 131k tokens, on a GPU")
    chosen = parser.parse_args()
    cases = [(2048, 128, 8, 2)] if chosen.quick else [(2048, 128, 8, 3), (4096, 256, 8, 2), (8192, 256, 8, 2)]
    if chosen.cuda:
        cases = [(32_768, 1024, 8, 3), (130_048, 1024, 8, 2)]
    good = all([speed(*case, chosen.cuda) for case in cases])
    if not chosen.cuda:
        good &= all([memory(2048 if chosen.quick else 8192, 128, 8, 1, cp)[0] for cp in (1, 2, 4)])
    if chosen.long:
        grown = [memory(prompt, 256, 8, 2, 2) for prompt in (8192, 16_384, 32_768)]
        linear = grown[2][1] <= 1.25 * (2 * grown[1][1]) and grown[1][1] <= 1.25 * (2 * grown[0][1])
        growth = [round(b[1] / a[1], 2) for a, b in zip(grown, grown[1:], strict=False)]
        print(json.dumps({"name": "memory grows linearly", "ratio": growth, "target": 2.5, "ok": linear}), flush=True)
        good &= linear and all(ok for ok, _ in grown)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

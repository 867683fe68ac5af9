"""What logging and diagnostics cost of an update. One JSON line per case; status 1 when a target is missed.

    PYTHONPATH=. python tools/bench/observe.py [--quick]

An update of dGRPO with a teacher on one rank, on fixed rollouts, generation left out: of a whole step the share is
smaller. `diagnostics` is all that is computed of the rows only to be seen: figures by position, disagreement of the
terms, the comparison of their gradients every `diagnostics_every` steps (here its default). `records` is what rank 0
does with the figures: metrics.jsonl, the console's line, TensorBoard's thread, progress and an event a step. Times are
processor time of the one thread that computes, medians over the updates; those of the records are by the clock.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _measure import Report

from megatron_dgrpo.config.schema import DGRPO, Objective
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed

TARGET = 0.02
OBJECTIVE = Objective(clip_low=0.2, clip_high=0.28, beta=0.5)


def trajectories(prompts: int, prompt: int, response: int, group: int, vocab_size: int) -> list[Trajectory]:
    draw = np.random.default_rng(0)
    made = []
    for number in range(prompts):
        tokens = draw.integers(0, vocab_size, prompt).astype(np.int32)
        for sample in range(group):
            ids = draw.integers(0, vocab_size, response).astype(np.int32)
            segment = Segment(ids, True, behaviour_logprobs=np.full(response, -8.0))
            made.append(Trajectory(str(number), sample, tokens, (segment,), "stop"))
    return made


def updates(rank: int, world: int, folder: str, rollouts: list[Trajectory], count: int, run_dir: str) -> dict[str, Any]:
    """Seconds of each update: of all of it, of its diagnostics, of its records."""
    import torch

    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.config.schema import Adam
    from megatron_dgrpo.config.trackers import TensorBoard
    from megatron_dgrpo.model.flops import training_cost
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.observe.console import Console
    from megatron_dgrpo.observe.progress import Board
    from megatron_dgrpo.observe.records import Records
    from megatron_dgrpo.observe.timers import Phases
    from megatron_dgrpo.observe.trackers import trackers
    from megatron_dgrpo.packing import trees
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train import update
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.teachers import Teachers

    torch.set_num_threads(1)
    groups, options, spec = Groups(tp=1, cp=1, dp=1, pp=1, ep=1, etp=1), BuildOptions(torch.float32), read_spec(folder)
    groups.seed(0)
    teacher = load_teacher(folder, groups=groups, options=options, student_spec=spec, student_groups=groups)
    student = load_student(folder, groups=groups, options=options)
    student.start_optimizer(Adam(lr=1e-6))
    packing = Packing(16384, dp=1, cp=1, multiple_of=1, rounds_of=1, cost=training_cost(spec))
    grown = trees.trees(rollouts)
    lessons = Teachers(("teacher",), (teacher,)).teach(rollouts, packing)
    batches = packing.micro_batches(grown, rank=0, cp_rank=0)
    rewards = np.random.default_rng(1).random(len(rollouts))
    streams, (loss, factors) = dgrpo_streams(rollouts, rewards, OBJECTIVE).streams, dgrpo_loss(OBJECTIVE)
    records = Records(
        run_dir, Console(io.StringIO()), trackers=trackers((TensorBoard(kind="tensorboard"),), run_dir, {})
    )
    records.board = Board(Path(run_dir) / "board.json")
    seen = {"update": [], "diagnostics": [], "balanced": [], "records": []}  # type: dict[str, list[float]]
    inside = [0.0]
    plain = update._metrics

    def timed(*args: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*args)
        finally:
            inside[0] += time.process_time() - start

    vars(update)["_metrics"] = timed
    for step in range(count + 1):
        balance = step % 2 == 1
        inside[0], start = 0.0, time.process_time()
        work = update.Work(batches, streams, loss, factors, 1.0, lessons, balance=balance)
        metrics = update.compute_gradients(student, work) | student.update()
        whole = time.process_time() - start
        begun, phases = time.perf_counter(), Phases()
        records.begin("dgrpo", 0, step, count)
        with records.board.task("generate", 512) as task, phases("train"):
            for _ in range(512):
                task.advance()
        records.report("dgrpo", 0, step, count, metrics | {"tokens": 1e6}, update=1, phases=phases)
        records.note("an event")
        if step:  # the first one warms up
            seen["balanced" if balance else "diagnostics"].append(inside[0])
            seen["update"].append(whole - inside[0])
            seen["records"].append(time.perf_counter() - begun)
    records.close()
    return {name: statistics.median(values) for name, values in seen.items()} | {"figures": len(metrics)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small case alone")
    quick, report = parser.parse_args().quick, Report()
    every = DGRPO.model_fields["diagnostics_every"].default
    cases = [("h128, vocabulary 4,096, P=512, R=64, G=8", 128, 4, 4096, (4, 512, 64, 8))]
    if not quick:
        cases.append(("h256, vocabulary 32,768, P=2,048, R=128, G=8", 256, 8, 32768, (1, 2048, 128, 8)))
    for name, hidden, layers, vocab_size, (prompts, prompt, response, group) in cases:
        with tempfile.TemporaryDirectory() as scratch:
            from megatron_dgrpo.testing.tiny import save_tiny_qwen3

            model = save_tiny_qwen3(
                Path(scratch) / "model", vocab_size=vocab_size, hidden=hidden, layers=layers, max_positions=4096
            )
            rollouts = trajectories(prompts, prompt, response, group, vocab_size)
            (found,) = run_distributed(updates, 1, str(model), rollouts, 8, f"{scratch}/run", timeout_s=540)
        balance = max(0.0, found["balanced"] - found["diagnostics"])
        cost = found["diagnostics"] + balance / every + found["records"]
        step = found["update"] + cost
        report.line(
            name, ratio=cost / step, target=TARGET, update_s=found["update"], diagnostics_s=found["diagnostics"],
            balance_s=balance, balance_every=every, records_s=found["records"], figures=found["figures"],
        )  # fmt: skip
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())

"""One GRPO update against TRL's GRPOTrainer on the same rollouts. One JSON line per case; status 1 on a miss.

    python tools/bench/step.py [--quick] [--rounds 3] [--peers DIR]

TRL is imported from DIR (`pip install --target DIR --no-deps trl==1.16.0 accelerate==1.15.0`) or from where Python
finds it; without it there is nothing to compare with, which is a miss.

What is compared. One prompt of P=2048 tokens with G=8 responses of R=128, rewards 0 and 1 in turn, GRPO (beta 0), one
update per batch, float32, one thread. TRL's own `GRPOTrainer.train()` runs: its `rollout_func` hands it the fixed
rollouts, and its update is what lies between the end of its `_prepare_inputs` and its callback after the optimizer's
step. Ours is packing, `compute_gradients` and `Student.update`. Both use SDPA's flash operator and no mask: TRL runs
under `sdpa_kernel(FLASH_ATTENTION)`, which refuses any other. That both make the same update is held by the norm of
their gradients, which is a case of its own.

TRL computes its head in two ways. With Triton it scores response tokens; without, it scores every position of every
copy, which on CPU would be most of its time at a large vocabulary. The ratio to the target is taken from `trl, rows`,
which is told to do on CPU what it does on a GPU, with all responses at once or one by one with accumulated gradients,
whichever is faster; `trl` is TRL as it comes.

`predicted` is the ratio of FLOPs by `model.flops`, copies to the tree. Time is processor time of one thread and the
best of some rounds; memory is the growth of the peak resident set, with each case in a process of its own.

Generation is apart, of one prompt's G responses: the engine host here, TRL's own `_generate` (transformers) there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Report, in_fresh_process, measured
from rollout import processor_time

from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing.tiny import save_tiny_qwen3, save_tokenizer

MODEL = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 384}
LR, CLIP, WORDS = 1e-5, 0.2, 500
OF_THE_TARGET = ("trl, rows", "trl, rows, one by one")
CASES = ("tree", *OF_THE_TARGET, "trl")


def rollouts(prompt: int, response: int, size: int) -> tuple[list[int], list[list[int]], list[float]]:
    """Ids that every vocabulary of the cases has."""
    draw = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return [int(i) for i in draw.integers(0, WORDS, count)]

    return ids(prompt), [ids(response) for _ in range(size)], [float(i % 2) for i in range(size)]


def save_model(folder: Path, vocabulary: int, context: int) -> None:
    special = save_tokenizer(folder, [f"w{i}" for i in range(WORDS)], starts_with_bos=False)
    save_tiny_qwen3(folder, vocab_size=vocabulary, max_positions=context, special_ids=special, **MODEL)  # type: ignore[arg-type]


def groups_of_one() -> Any:
    """Process groups of a world of one rank."""
    from megatron_dgrpo.launch.rendezvous import init_process_group
    from megatron_dgrpo.parallel import platform
    from megatron_dgrpo.parallel.groups import Groups

    platform.install()
    init_process_group(Path(tempfile.mkdtemp()), rank=0, world_size=1, backend="gloo", timeout_s=600)
    groups = Groups(tp=1, dp=1)
    groups.seed(0)
    return groups


class Ours:
    def __init__(self, folder: str, shape: tuple[int, int, int]) -> None:
        from megatron_dgrpo.config.schema import Adam
        from megatron_dgrpo.model.megatron_config import BuildOptions
        from megatron_dgrpo.train.student import load_student

        self.student = load_student(folder, groups=groups_of_one(), options=BuildOptions(torch.float32))
        self.student.start_optimizer(Adam(lr=LR, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.999)))
        prompt, responses, self.rewards = rollouts(*shape)
        self.trajectories = [
            Trajectory("p", i, np.asarray(prompt), (Segment(np.asarray(r), True),), "stop")
            for i, r in enumerate(responses)
        ]
        self.room = shape[0] + shape[1] * shape[2]

    def update(self) -> dict[str, float]:
        from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
        from megatron_dgrpo.config.objective import Advantages, Objective
        from megatron_dgrpo.packing.pack import Packing
        from megatron_dgrpo.packing.trees import trees
        from megatron_dgrpo.train.update import Work, compute_gradients

        objective = Objective(
            beta=0.0, clip_low=CLIP, clip_high=CLIP, advantages=Advantages(std="sample", epsilon=1e-4)
        )
        layouts = Packing(self.room).micro_batches(trees(self.trajectories))
        streams = dgrpo_streams(self.trajectories, self.rewards, objective).streams
        loss, factors = dgrpo_loss(objective)
        metrics = compute_gradients(self.student, Work(layouts, streams, loss, factors, 1.0))
        return metrics | self.student.update()


def predicted(folder: str, shape: tuple[int, int, int]) -> float:
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.model.flops import training_cost
    from megatron_dgrpo.packing.trees import trees

    prompt, responses, _ = rollouts(*shape)
    group = [
        Trajectory("p", i, np.asarray(prompt), (Segment(np.asarray(r), True),), "stop") for i, r in enumerate(responses)
    ]
    (tree,) = trees(group)
    cost = training_cost(read_spec(folder))
    return cost.of_copies(tree) / cost.of(tree)


class Theirs:
    """TRL's trainer over fixed rollouts. What one call of its loop spends on the update is in `spent`."""

    def __init__(self, folder: str, shape: tuple[int, int, int], *, rows: bool, one_by_one: bool, steps: int) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from transformers.utils import logging
        from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]
        from trl.trainer import utils  # type: ignore[import-not-found]

        logging.disable_progress_bar()
        if rows:  # in this module it only says whether all positions are scored
            utils._use_triton = lambda device: True
        prompt, responses, rewards = rollouts(*shape)
        size = len(responses)
        self.spent: list[dict[str, float]] = []
        self.norms: list[float] = []
        clock: dict[str, Any] = {}
        peak = peak_growth()
        outer = self

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                outer.spent.append({"seconds": time.process_time() - clock["start"], "bytes": peak()})
                clock.clear()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                outer.norms += [logs["grad_norm"]] if "grad_norm" in logs else []

        class Trainer(GRPOTrainer):  # type: ignore[misc]
            def _prepare_inputs(self, batch: Any) -> Any:
                prepared = super()._prepare_inputs(batch)
                if not clock:
                    peak(reset=True)
                    clock["start"] = time.process_time()
                return prepared

        def fixed(prompts: Any, trainer: Any) -> dict[str, Any]:
            none = [[-1.0] * len(r) for r in responses]
            return {"prompt_ids": [prompt] * size, "completion_ids": responses, "logprobs": none}

        def reward(completions: Any, **_: Any) -> list[float]:
            return rewards

        at_once = 1 if one_by_one else size
        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=at_once, num_generations=size,
            gradient_accumulation_steps=size // at_once, max_steps=steps, learning_rate=LR, beta=0.0, epsilon=CLIP,
            loss_type="grpo", max_completion_length=shape[1], bf16=False, use_cpu=True, gradient_checkpointing=False,
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
            model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"}, shuffle_dataset=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        self.trainer = Trainer(
            model=folder, reward_funcs=reward, args=settings, train_dataset=Dataset.from_dict({"prompt": ["w0"] * 2}),
            processing_class=AutoTokenizer.from_pretrained(folder), rollout_func=fixed, callbacks=[Clock()],
        )  # fmt: skip
        self.prompt, self.size = prompt, size

    def train(self) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), contextlib.redirect_stdout(sys.stderr):
            self.trainer.train()

    def generate(self) -> dict[str, float]:
        """What its own generation takes. Responses may end before R tokens."""
        start = time.process_time()
        found, _ = self.trainer._generate_single_turn([self.prompt] * self.size, None, {}, self.size)
        return {"seconds": time.process_time() - start, "tokens": sum(map(len, found))}


def peak_growth() -> Any:
    """Bytes that the peak has grown by since `reset`."""
    base = 0

    def status(field: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
        return int(line.split()[1]) * 1024

    def peak(reset: bool = False) -> int:
        nonlocal base
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
            base = status("VmRSS")
        return max(0, status("VmHWM") - base)

    return peak


def child(case: str, folder: str, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """A case in this process: an update to warm up, whose gradient is the one to compare, then those that count."""
    if case == "tree":
        ours = Ours(folder, shape)
        norm = ours.update()["grad_norm"]
        return best([measured("cpu", ours.update) for _ in range(rounds)]) | {"grad_norm": norm}
    warnings.simplefilter("ignore")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if case == "generate":
        return Theirs(folder, shape, rows=False, one_by_one=False, steps=1).generate()
    theirs = Theirs(folder, shape, rows="rows" in case, one_by_one="one by one" in case, steps=rounds + 1)
    theirs.train()
    return best(theirs.spent[1:]) | {"grad_norm": theirs.norms[0]}


def best(found: list[dict[str, float]]) -> dict[str, float]:
    return {"seconds": min(f["seconds"] for f in found), "bytes": max(f["bytes"] for f in found)}


def generate_ours(folder: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """The engine host, asked for the group; the prompt was not seen before."""
    from megatron_dgrpo.rollout.client import EngineClient
    from megatron_dgrpo.rollout.messages import GenerateRequest
    from megatron_dgrpo.testing.distributed import session_nursery

    prompt, response, size = shape
    with tempfile.TemporaryDirectory() as home:
        address, key, log = f"unix:{home}/host", secrets.token_hex(32), Path(home) / "log"
        settings: dict[str, Any] = dict(
            address=address, key=key, model_path=folder, dtype="float32", max_model_len=prompt + response,
            kv_cache_bytes=2**27, max_num_seqs=size, prefix_cache=True, threads=1,
        )  # fmt: skip
        server = session_nursery("engine")
        server.wait_ready()
        host = server.start("host", "megatron_dgrpo.rollout.host:serve", settings, log_path=log)
        try:
            client = EngineClient.connect(address, key, deadline_s=300)
            for first, max_tokens in ((1, 2), (0, response)):  # the first is to warm up
                tokens = np.roll(np.asarray(rollouts(*shape)[0], np.int32), first)
                request = GenerateRequest("p", tokens, tuple(range(size)), max_tokens, 1.0, ())
                start = processor_time(host.pid) + time.process_time()
                found = list(client.generate([request], deadline_s=600))
                seconds = processor_time(host.pid) + time.process_time() - start
            client.close()
        finally:
            host.kill()
            host.wait(10)
    return {"seconds": seconds, "tokens": sum(len(c.tokens) for c in found)}


def compare(report: Report, vocabulary: int, options: argparse.Namespace) -> None:
    shape = (512, 32, 4) if options.quick else (2048, 128, 8)
    values: dict[str, Any] = dict(zip(("P", "R", "G"), shape, strict=True)) | {"vocabulary": vocabulary}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        save_model(folder, vocabulary, sum(shape[:2]))
        call = ["--folder", home, "--shape", *map(str, shape), "--peers", options.peers]
        found: dict[str, dict[str, Any]] = {}
        for case in CASES:  # TRL's head over all positions takes long: one round
            rounds = 1 if options.quick or case == "trl" else options.rounds
            arguments = ["--case", case, "--rounds", str(rounds), *call]
            found[case] = in_fresh_process(arguments, threads=1, return_memory=True)
            report.line(case, **values, **found[case])
        against(report, values, found, predicted(home, shape), timed=not options.quick)
        if vocabulary == options.vocabulary[0]:
            theirs = in_fresh_process(["--case", "generate", *call], threads=1)
            for name, spent in (("generate: engine host", generate_ours(home, shape)), ("generate: trl", theirs)):
                report.line(name, **values, **spent)


def against(
    report: Report, values: dict[str, Any], found: dict[str, dict[str, Any]], prediction: float, *, timed: bool
) -> None:
    ours = found["tree"]
    peers = [found[case] for case in OF_THE_TARGET if "error" not in found[case]]
    if not peers or "error" in ours:
        report.line("time of the update: TRL to ours", **values, target=0.8, error="not measured")
        return
    ratio = min(peer["seconds"] for peer in peers) / ours["seconds"]
    share = ratio / prediction
    report.line(
        "time of the update: TRL to ours, share of the prediction", **values, times=ratio, predicted=prediction,
        ratio=share, target=0.8 if timed else None, at_most=False,
    )  # fmt: skip
    for case in CASES[1:]:
        if "error" not in found[case]:
            times = found[case]["seconds"] / ours["seconds"]
            report.line(f"{case} to ours", **values, times=times, memory=found[case]["bytes"] / ours["bytes"])
    apart = max(abs(peer["grad_norm"] / ours["grad_norm"] - 1) for peer in peers)
    report.line("gradient norms differ by", **values, ratio=apart, target=1e-3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short prompt and a small head, no target on time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="", help="the folder that TRL was installed into")
    parser.add_argument("--vocabulary", type=int, nargs="+", help="sizes of the head", default=[1024, 151_936])
    parser.add_argument("--case", choices=[*CASES, "generate"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    if options.case:
        print(json.dumps(child(options.case, options.folder, tuple(options.shape), options.rounds)))
        return 0
    report = Report()
    for vocabulary in options.vocabulary[: 1 if options.quick else None]:
        compare(report, vocabulary, options)
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())

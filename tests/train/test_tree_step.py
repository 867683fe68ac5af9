"""What one step computes, counted where it is computed: each token once, each loss row once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Objective
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

PROMPTS, RESPONSES = (40, 23), ((7, 1, 5), (9, 2))
LAYERS = 2
VOCAB = 96


def _trajectories() -> list[Trajectory]:
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(0, VOCAB, n)  # noqa: E731
    result = []
    for group, (length, sizes) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        prompt = ids(length)
        result += [Trajectory(str(group), i, prompt, (Segment(ids(n), True),), "stop") for i, n in enumerate(sizes)]
    return result


def _watch(decoder: torch.nn.Module, counts: dict[str, int], who: str) -> None:
    """Count tokens in forward and backward at the embedding and at every linear layer."""

    def count(key: str, tokens: int) -> None:
        counts[f"{who} {key}"] = counts.get(f"{who} {key}", 0) + tokens

    def hook(name: str):
        def after(module, inputs, output) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if not out.is_floating_point():
                return
            tokens = out.shape[0] * out.shape[1]
            count(f"{name} forward", tokens)
            if out.requires_grad:
                out.register_hook(lambda grad: count(f"{name} backward", tokens))

        return after

    for path, module in decoder.named_modules():
        name = path.rpartition(".")[2]
        if name in ("word_embeddings", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "core_attention"):
            module.register_forward_hook(hook(name))


def _step(rank: int, world: int, folder: str, teacher_folder: str, trajectories, cp: int):
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_dgrpo.algorithms.build import dgrpo_loss, dgrpo_streams
    from megatron_dgrpo.model import attention_ops
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.teacher.frozen import load_teacher
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.teachers import Lesson
    from megatron_dgrpo.train.update import Work, compute_gradients

    counts: dict[str, int] = {}
    forward = attention_ops.forward

    def counting(q, k, v, *, causal, scale):
        size = q.shape[2]
        pairs = q.shape[0] * (size * (size + 1) // 2 if causal else size * k.shape[2])
        counts["pairs"] = counts.get("pairs", 0) + pairs
        return forward(q, k, v, causal=causal, scale=scale)

    attention_ops.forward = counting
    groups = Groups(tp=1, cp=cp, dp=1)
    groups.seed(0)
    options = BuildOptions(torch.float64)
    student = load_student(folder, groups=groups, options=options)
    teacher = load_teacher(
        teacher_folder, groups=groups, options=options, student_spec=student.decoder.spec, student_groups=groups
    )
    _watch(student.decoder, counts, "student")
    _watch(teacher.decoder, counts, "teacher")
    heads = [student.decoder.head().weight_VH, teacher.head.weight_VH]
    bytes_of = [range(w.data_ptr(), w.data_ptr() + w.nbytes) for w in heads]

    class Logits(TorchDispatchMode):
        """Count elements of products with a head's weight whose contraction is over the hidden size."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                second = args[-1]
                if any(second.data_ptr() in place for place in bytes_of) and second.stride(0) == 1:
                    counts["logits"] = counts.get("logits", 0) + out.numel()
            return out

    streams = dgrpo_streams(trajectories, [1.0, 0.0, 0.5, 1.0, 0.0], Objective()).streams
    packing, grown = Packing(64, cp=cp), trees(trajectories)
    layouts = packing.micro_batches(grown, cp_rank=groups.grid.coordinate("cp"))
    loss, factors = dgrpo_loss(Objective())
    with Logits():
        rows = teacher.rows(grown, packing)
        compute_gradients(student, Work(layouts, streams, loss, factors, 1.0, [Lesson("teacher", teacher.head, rows)]))
    return counts


@pytest.mark.parametrize("cp", [1, 2])
def test_a_step_is_one_forward_and_backward_of_the_student_and_one_forward_of_the_teacher(
    tmp_path: Path, cp: int
) -> None:
    sizes = {"vocab_size": VOCAB, "heads": 4, "kv_heads": 2, "layers": LAYERS}
    folders = [
        save_tiny_qwen3(tmp_path / "student", **sizes),
        save_tiny_qwen3(tmp_path / "teacher", hidden=96, **sizes),
    ]
    ranks = run_distributed(_step, cp, *map(str, folders), _trajectories(), cp)
    counts = {key: sum(found.get(key, 0) for found in ranks) for key in ranks[0]}
    tokens = sum(PROMPTS) + sum(map(sum, RESPONSES))
    rows = sum(map(sum, RESPONSES))
    causal = lambda n: n * (n + 1) // 2  # noqa: E731
    pairs = sum(causal(p) + sum(r * p + causal(r) for r in sizes) for p, sizes in zip(PROMPTS, RESPONSES, strict=True))
    expected = {"student word_embeddings forward": tokens, "student word_embeddings backward": tokens}
    expected["teacher word_embeddings forward"] = tokens
    for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "core_attention"):
        expected |= {f"{who} {name} forward": tokens * LAYERS for who in ("student", "teacher")}
        expected[f"student {name} backward"] = tokens * LAYERS
    expected["pairs"] = 2 * LAYERS * pairs  # of the student and of the teacher
    logits = counts.pop("logits")
    assert counts == expected
    assert logits in (2 * rows * VOCAB, 4 * rows * VOCAB)  # both heads; kept for the gradient, or made again for it

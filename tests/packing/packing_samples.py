"""Trajectories for the tests of packing."""

from __future__ import annotations

import numpy as np

from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.packing.trees import Tree


def trajectory(name: str, sample: int, prompt: list[int], *segments: tuple[list[int], bool]) -> Trajectory:
    parts = tuple(Segment(np.asarray(tokens, np.int32), trained) for tokens, trained in segments)
    return Trajectory(name, sample, np.asarray(prompt, np.int32), parts, "stop")


def groups(count: int, longest: int = 30, size: int = 4, seed: int = 0) -> list[Trajectory]:
    """Ragged responses, of which some have a tool's output in their middle and some are a single token."""
    draw = np.random.default_rng(seed)
    ids = lambda n: draw.integers(1, 1000, n).tolist()  # noqa: E731
    result = []
    for i in range(count):
        prompt = ids(draw.integers(1, longest))
        for sample in range(size):
            tool = [(ids(draw.integers(1, 4)), False), (ids(draw.integers(1, 9)), True)] if sample % 2 else []
            first = ids(draw.integers(1, 9)) if sample else ids(1)
            result.append(trajectory(str(i), sample, prompt, (first, True), *tool))
    return result


def whole(trajectories: list[Trajectory]) -> list[tuple[list[int], int]]:
    """Per loss token of the batch: everything before it in its sequence, and the token. In the streams' order."""
    expected = []
    for t in trajectories:
        tokens = [*t.prompt_tokens.tolist(), *t.response_tokens.tolist()]
        marks = [False] * len(t.prompt_tokens)
        for segment in t.segments:
            marks += [segment.trained] * len(segment.tokens)
        expected += [(tokens[:i], tokens[i]) for i, trained in enumerate(marks) if trained]
    return expected


def micro_batches(trees: list[Tree], max_tokens: int, *, rank: int = 0, cp_rank: int = 0, **packing) -> list[Layout]:
    return Packing(max_tokens, **packing).micro_batches(trees, rank=rank, cp_rank=cp_rank)

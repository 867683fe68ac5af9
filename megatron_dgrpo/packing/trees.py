"""Trajectories to trees: responses to one prompt share its tokens, so that the prompt is computed once.

The stream index of a loss token counts the loss tokens of the whole batch, trajectory by trajectory in the batch's
order, and token by token within a trajectory. Every rank numbers the whole batch alike and then packs its own share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_dgrpo.errors import DataError, listing
from megatron_dgrpo.packing.trajectory import Trajectory


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of a trunk or a branch, and which of them are predicted by the ones before them."""

    name: str
    tokens_T: np.ndarray  # int64
    targets_K: np.ndarray  # int64, ascending indices into tokens_T; in a branch, 0 is predicted by the trunk's end
    first_stream: int  # stream index of the first target

    def __len__(self) -> int:
        return len(self.tokens_T)


@dataclass(frozen=True)
class Tree:
    trunk: Run
    branches: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        return self.trunk.name

    @property
    def num_tokens(self) -> int:
        return len(self.trunk) + sum(len(branch) for branch in self.branches)

    @property
    def num_rows(self) -> int:
        return len(self.trunk.targets_K) + sum(len(branch.targets_K) for branch in self.branches)

    @property
    def order(self) -> int:
        """Trees are numbered by their first loss token."""
        return (self.branches or (self.trunk,))[0].first_stream


def sequence(name: str, tokens_T: np.ndarray, trained_T: np.ndarray, first_stream: int) -> Tree:
    """A document whose tokens marked in `trained_T` are loss tokens; the first token can't be one."""
    targets_K = np.flatnonzero(trained_T)
    if len(targets_K) == 0 or targets_K[0] == 0:
        what = "has no token to train on" if len(targets_K) == 0 else "has no prompt before its first trained token"
        raise DataError(f"{name} {what}: a response needs at least one token, and a prompt before it")
    return Tree(Run(name, tokens_T.astype(np.int64), targets_K.astype(np.int64), first_stream))


def name_of(trajectory: Trajectory) -> str:
    return f"sample {trajectory.sample} of prompt {trajectory.prompt_id}"


def documents(trajectories: Iterable[Trajectory]) -> list[Tree]:
    """One tree without branches per trajectory, numbered in the order given: prompts are repeated."""
    result, stream = [], 0
    for trajectory in trajectories:
        prompt_T = np.asarray(trajectory.prompt_tokens)
        response_T, trained_T = _response(trajectory)
        trained_T = np.concatenate([np.zeros(len(prompt_T), bool), trained_T])
        result.append(sequence(name_of(trajectory), np.concatenate([prompt_T, response_T]), trained_T, stream))
        stream += trajectory.num_loss_tokens
    return result


def trees(trajectories: Iterable[Trajectory]) -> list[Tree]:
    """One tree per prompt, in the order in which prompts first appear.

    Responses share a trunk where both the prompt's id and its tokens are the same.
    """
    groups: dict[tuple[str, bytes], tuple[np.ndarray, list[Run]]] = {}
    stream, problems = 0, []
    for trajectory in trajectories:
        prompt_T = np.asarray(trajectory.prompt_tokens).astype(np.int64)
        response_T, trained_T = _response(trajectory)
        targets_K = np.flatnonzero(trained_T).astype(np.int64)
        if len(targets_K) == 0:
            problems.append(f"{name_of(trajectory)} has no token to train on")
        if len(prompt_T) == 0:
            problems.append(f"{name_of(trajectory)} has no prompt before its first trained token")
        _, branches = groups.setdefault((trajectory.prompt_id, prompt_T.tobytes()), (prompt_T, []))
        branches.append(Run(name_of(trajectory), response_T.astype(np.int64), targets_K, stream))
        stream += len(targets_K)
    if problems:
        raise DataError(listing("a response needs at least one token, and a prompt before it:", problems))
    none = np.zeros(0, np.int64)
    return [
        Tree(Run(f"prompt {prompt_id}", prompt_T, none, 0), tuple(branches))
        for (prompt_id, _), (prompt_T, branches) in groups.items()
    ]


def _response(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Every token after the prompt, and which of them were sampled."""
    marks = [np.full(len(segment.tokens), segment.trained) for segment in trajectory.segments]
    return trajectory.response_tokens, np.concatenate(marks) if marks else np.zeros(0, bool)


def cut_to_fit(grown: Sequence[Tree], room: int, *, setting: str) -> list[Tree]:
    """Trees of at most `room` tokens: a group that is too large becomes several trees, each with the prompt.

    They are as few as possible, and filled evenly.
    """
    problems = [
        f"{branch.name} has {len(branch) + len(tree.trunk) * bool(tree.branches)} tokens"
        for tree in grown
        for branch in tree.branches or (tree.trunk,)
        if len(branch) + len(tree.trunk) * bool(tree.branches) > room
    ]
    if problems:
        raise DataError(listing(f"a micro-batch holds {room} tokens ({setting}); raise it, since:", problems))
    return [part for tree in grown for part in _cut(tree, room)]


def _cut(tree: Tree, room: int) -> list[Tree]:
    if tree.num_tokens <= room:
        return [tree]
    left = room - len(tree.trunk)
    count = -(-sum(len(branch) for branch in tree.branches) // left)
    while True:  # longest first to the emptiest part; one more part where that does not fit
        parts: list[list[Run]] = [[] for _ in range(count)]
        loads = [0] * count
        for branch in sorted(tree.branches, key=len, reverse=True):
            emptiest = loads.index(min(loads))
            parts[emptiest].append(branch)
            loads[emptiest] += len(branch)
        if max(loads) <= left:
            break
        count += 1
    in_order = (tuple(sorted(part, key=lambda branch: branch.first_stream)) for part in parts)
    return sorted((replace(tree, branches=part) for part in in_order), key=lambda part: part.order)

"""A sharded model's gradients and weights as whole tensors in Hugging Face names, for comparison with a reference.

A rank hands out what it holds (`pieces`); the test's own process puts the ranks' pieces together (`whole`), and
complains when replicas differ or a part is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Piece(NamedTuple):
    hf_name: str
    hf_shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    tensor: torch.Tensor


def gather_data_parallel_gradients(wrapped: Iterable[Any]) -> None:
    """Make every data-parallel rank's gradient buffers whole: the distributed optimizer leaves each only its shard."""
    for part in wrapped:
        for buffer in (*part.buffers, *part.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)


def gather_first_moments(student: Any) -> None:
    """Give every parameter Adam's `first_moment` of it, whole: each data-parallel rank's optimizer has its shard."""
    optimizers = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    groups = student.decoder.groups
    for parameter in student.decoder.parameters():
        parameter.first_moment = torch.zeros_like(parameter, requires_grad=False)
        for optimizer in optimizers:
            if parameter in optimizer.model_param_group_index_map:
                held = optimizer._get_model_param_range_map(parameter)["param"]
                shard = optimizer._get_main_param_and_optimizer_states(parameter)["exp_avg"]
                parameter.first_moment.view(-1)[held.start : held.end] = shard
        shared = getattr(parameter, "allreduce", True)  # False: an expert's
        dist.all_reduce(parameter.first_moment, group=groups.dp_cp if shared else groups.collection.expt_dp)


def pieces(decoder: Any, attribute: str) -> list[Piece]:
    """This rank's parts of every parameter's `main_grad`, `data` or `first_moment`."""
    from megatron_dgrpo.checkpoint.hf.importer import box_of
    from megatron_dgrpo.checkpoint.hf.mapping import rules
    from megatron_dgrpo.model.decoder import local_parameters

    grid, parameters, found = decoder.groups.grid, local_parameters(decoder), []
    for rule in rules(decoder.spec):
        if rule.parameter in parameters:
            tensor = getattr(parameters[rule.parameter], attribute).detach()
            for span in rule.held(grid):
                part = tensor.narrow(rule.axis or 0, span.local, span.length).clone()
                found.append(Piece(rule.hf_name, rule.hf_shape, box_of(rule, span.hf, span.length), part))
    return found


def whole(ranks: Iterable[Sequence[Piece]], tolerance: float = 0.0) -> dict[str, torch.Tensor]:
    """Whole tensors out of all ranks' pieces. Replicas may differ by `tolerance`, relative to their largest value."""
    tensors: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for piece in (piece for rank in ranks for piece in rank):
        full = tensors.setdefault(piece.hf_name, piece.tensor.new_zeros(piece.hf_shape))
        done = filled.setdefault(piece.hf_name, torch.zeros(piece.hf_shape, dtype=torch.bool))
        at = tuple(slice(*bounds) for bounds in piece.box)
        if bool(done[at].all()):
            gap = (full[at] - piece.tensor).abs().max().item()
            assert gap <= tolerance * piece.tensor.abs().max().item(), f"replicas of {piece.hf_name} differ by {gap}"
        full[at], done[at] = piece.tensor, True
    missing = [name for name, done in filled.items() if not bool(done.all())]
    assert not missing, f"parts of these are on no rank: {missing}"
    return tensors


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()

"""The optimizer's state as a checkpoint has it: tensors with the names and shapes of the parameters, at any layout.

Megatron's distributed optimizer keeps, on each data-parallel rank, a range [start, stop) of every flattened parameter:
the master weight and the moments of these elements. Megatron's own way to a format that loads at any layout
(`fully_reshardable`) gathers all ranges on every rank of the data-parallel group, in five passes over fresh memory.
Here nothing is gathered and nothing copied: a range of a flattened tensor is a few boxes of it,

    . . x x      a part of a row,
    x x x x      whole rows,
    x . . .      a part of a row

and each box is a piece of the distributed format by itself, a view of what the optimizer holds. A rank writes its own
pieces, and reads into them; torch's writer checks that the pieces of all ranks cover each tensor once. A parameter that
the model describes as several tensors (gate and up-projection) has boxes in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.optimizer import MegatronOptimizer

from megatron_dgrpo.model.decoder import Decoder

_PREFIX = "optimizer.state"


class Box(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    """Where its first element is in the flattened tensor."""


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements [start, stop) of a flattened tensor are, in their order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,), start)
        return
    row, inner = math.prod(shape[1:]), tuple(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _within(inner, last, row, start, stop)
        return
    yield from _within(inner, first - 1, row, start, first * row)
    if first < last:
        yield Box((first, *(0 for _ in inner)), (last - first, *inner), first * row)
    yield from _within(inner, last, row, last * row, stop)


def _within(inner: tuple[int, ...], number: int, row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes, at in boxes(inner, start - number * row, stop - number * row):
        yield Box((number, *offsets), (1, *sizes), number * row + at)


def optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's distributed ones: with expert parallelism, one for the experts and one for the rest."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def num_steps(optimizer: MegatronOptimizer) -> int:
    found = [0]
    for each in optimizers(optimizer):
        found += [int(group.get("step", 0)) for group in each.optimizer.param_groups]
        found += [int(state["step"]) for state in each.optimizer.state.values() if "step" in state]  # of those on CPU
    return max(found)


def allocate(optimizer: MegatronOptimizer, steps: int) -> None:
    """State to load into, after so many steps."""
    for each in optimizers(optimizer):
        state = each.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = steps
        each.load_state_dict(state)


Held = list[tuple[Any, torch.Tensor, dict[str, torch.Tensor]]]
"""(optimizer, parameter, its tensors)"""


def put_back(held: Held) -> None:
    """What was loaded into the tensors of `sharded_optimizer`, where they are copies: state in fewer bits, on CPU."""
    with torch.no_grad():
        for each, parameter, tensors in held:
            each._set_main_param_and_optimizer_states(parameter, tensors)
    for each in {id(each): each for each, _, _ in held}.values():
        if hasattr(each.optimizer, "_sync_hdo_state_to_sub_optimizers"):
            each.optimizer._sync_hdo_state_to_sub_optimizers()


def sharded_optimizer(
    decoder: Decoder, optimizer: MegatronOptimizer, held: Held | None = None
) -> dict[str, list[ShardedTensor]]:
    """What this rank holds of each tensor, as views; `held` gets the tensors."""
    with decoder.groups.as_default():
        model = decoder.sharded_state_dict(metadata={"dp_cp_group": decoder.groups.dp_cp})
    entries = {entry.data: entry for entry in model.values() if isinstance(entry, ShardedTensor | ShardedTensorFactory)}
    found: dict[str, list[ShardedTensor]] = {}
    for each in optimizers(optimizer):
        for ranges in (r for of_dtype in each.gbuf_ranges for buckets in of_dtype.values() for r in buckets):
            for parameter, its in ranges["param_map"].items():
                tensors = each._get_main_param_and_optimizer_states(parameter)
                tensors.pop("step", None)  # of optimizers on CPU; see num_steps
                if held is not None:
                    held.append((each, parameter, tensors))
                for piece in _pieces(entries[parameter], parameter, its["param"].start, its["param"].end, tensors):
                    found.setdefault(piece.key, []).append(piece)
    return found


def _pieces(
    entry: Any, parameter: torch.Tensor, start: int, stop: int, tensors: dict[str, torch.Tensor]
) -> Iterator[ShardedTensor]:
    """Of elements [start, stop) of a flattened parameter; `tensors` have these elements."""
    described: dict[str, Any] = {"it": entry}
    apply_factories(described)
    for part in _leaves(described):
        assert part.data.is_contiguous() and part.data.untyped_storage().data_ptr() == _storage(parameter), part.key
        at = part.data.storage_offset() - parameter.storage_offset()  # where its elements are among the parameter's
        shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        for box in boxes(shape, max(start - at, 0), min(stop - at, part.data.numel())):
            first, size = box.start + at - start, math.prod(box.sizes)
            for name, tensor in tensors.items():
                data = tensor.detach().view(-1)[first : first + size].view(box.sizes)
                yield ShardedTensor(
                    key=f"{_PREFIX}.{name}.{part.key}",
                    data=data,
                    dtype=data.dtype,
                    local_shape=box.sizes,
                    global_shape=part.global_shape,
                    global_offset=tuple(a + b for a, b in zip(part.global_offset, box.offsets, strict=True)),
                    axis_fragmentations=None,  # no regular grid
                    replica_id=_of_models(part.replica_id),
                    allow_shape_mismatch=part.allow_shape_mismatch,
                )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _of_models(replica_id: Any) -> Any:
    """Which copy it is among stages and tensor-parallel ranks: no data-parallel rank has another one's range."""
    return (*replica_id[:-1], 0) if isinstance(replica_id, tuple) else replica_id


def _leaves(described: Any) -> Iterator[ShardedTensor]:
    if isinstance(described, ShardedTensor):
        yield described
    elif isinstance(described, dict | list):
        for inner in described.values() if isinstance(described, dict) else described:
            yield from _leaves(inner)

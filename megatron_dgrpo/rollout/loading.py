"""Where vLLM's model keeps each part of a checkpoint's tensors, found by watching vLLM load tensors that are not there.

vLLM's loaders take a whole tensor of the checkpoint, cut out what their rank needs, and copy that over a part of a
parameter. Given tensors of the `meta` device, which have a shape and no memory, they do all of this but the copies;
those are noted instead: *box of the checkpoint's tensor -> view of a parameter*. With the notes,

- rows of a tensor can be loaded when they come, where a loader would need all of it at once;
- an element is copied once, into its place, and what this rank does not need is not looked at;
- it is known before the first byte whether the tensors offered fill every parameter to its last element.

Notes are good as long as every parameter is where it was: vLLM puts some elsewhere (experts that it packs, a model that
sleeps), so whoever keeps notes compares `whereabouts`. While views are kept, no other memory can get their addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dgrpo.errors import TransferError, listing

_COPY, _CAST, _FILLS = torch.ops.aten.copy_, torch.ops.aten._to_copy, (torch.ops.aten.fill_, torch.ops.aten.zero_)


class Place(NamedTuple):
    box: tuple[tuple[int, int], ...]  # of the checkpoint's tensor
    view: torch.Tensor  # of a parameter, of the box's shape


def find_places(model: Any, manifest: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, list[Place]]:
    """The places of each tensor; none where this rank needs nothing of it. Raises where parameters would stay old."""
    offered = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in manifest.items()}
    with _Watch(offered) as watch:
        model.load_weights(list(offered.items()))
    if old := _unfilled(model, watch.filled):
        raise TransferError(listing("The tensors offered would leave parts of the engine's model old:", old))
    return watch.places


def _unfilled(model: torch.nn.Module, filled: Mapping[int, int]) -> list[str]:
    return [
        f"{name}: {parameter.numel() - count} of its {parameter.numel()} elements"
        for name, parameter in model.named_parameters()
        if (count := filled.get(_memory(parameter), 0)) < parameter.numel()
    ]


def whereabouts(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Where every parameter lies, and how."""
    return [(name, p.data_ptr(), p.shape, p.stride(), p.dtype) for name, p in model.named_parameters()]


def copy_rows(places: Sequence[Place], start: int, rows: torch.Tensor) -> int:
    """Copy the rows of a tensor from `start` on into their places; returns the number of elements."""
    copied = 0
    for box, view in places:
        if not box:
            view.copy_(rows)
            copied += 1
            continue
        first, last = max(box[0][0], start), min(box[0][1], start + len(rows))
        if first < last:
            source = rows[(slice(first - start, last - start), *(slice(*b) for b in box[1:]))]
            view[first - box[0][0] : last - box[0][0]].copy_(source)
            copied += source.numel()
    return copied


class _Watch(TorchDispatchMode):
    def __init__(self, offered: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._whole = {_memory(tensor): (name, tensor) for name, tensor in offered.items()}
        self.places: dict[str, list[Place]] = {name: [] for name in offered}
        self.filled: dict[int, int] = {}  # elements by the memory that they are in

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is _CAST and args[0].is_meta:
            return args[0]  # to where, and in which type, the parameter says
        if packet is _COPY and args[1].is_meta:
            return self._note(args[0], args[1])
        if packet in _FILLS:
            self._count(args[0])
        return func(*args, **(kwargs or {}))

    def _note(self, view: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        name, whole = self._whole.get(_memory(source), ("", source))
        box = _box(whole, source)
        if not name or box is None or view.shape != source.shape:
            raise TransferError(
                f"vLLM computes something from {name or 'a tensor'} before it loads it, as a {list(source.shape)}: "
                "only tensors of which it copies parts can be sent"
            )
        # A plain tensor: vLLM's parameters have Python code for every operation on them.
        self.places[name].append(Place(box, view.detach().as_subclass(torch.Tensor)))
        self._count(view)
        return view

    def _count(self, view: torch.Tensor) -> None:
        self.filled[_memory(view)] = self.filled.get(_memory(view), 0) + view.numel()


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _box(whole: torch.Tensor, part: torch.Tensor) -> tuple[tuple[int, int], ...] | None:
    """Which box of a tensor a view of it is; None if it is another kind of view."""
    if part.dim() != whole.dim():
        return None
    offset, box = int(part.storage_offset()), []
    for size, stride, length in zip(part.shape, part.stride(), whole.stride(), strict=True):
        if size > 1 and stride != length:
            return None
        start, offset = divmod(offset, length) if length else (0, offset)
        box.append((start, start + size))
    return tuple(box)

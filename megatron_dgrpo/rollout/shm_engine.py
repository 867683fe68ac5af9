"""A weight-transfer engine for vLLM: new weights are read from a file in shared memory and written over the old ones.

It runs inside vLLM's worker and is driven through vLLM's own calls, in this order:

    init_weight_transfer_engine   the whole manifest and the file: checked against the model; nothing has changed yet
    start_weight_update
    update_weights, repeatedly    some tensors, or rows of them, lie in the file: they are copied to where vLLM keeps
                                  them; afterwards the file may be overwritten
    finish_weight_update          fails if a tensor never came; packs experts again, which vLLM does at load time only

Linear layers find their new weights plain, and pack them when they are first used (`packed_linear.py`).

Every tensor of the model must arrive in every update, so an update that finishes leaves nothing of the old weights. One
that fails leaves the model half old and half new; vLLM would go on generating with it, so its driver must not.

What the model consists of is read from the headers of the checkpoint that it was loaded from: vLLM has itself checked
that those tensors cover the model. Names that vLLM takes no weight from may be missing: a head that is tied to the
embedding, and rotary frequencies.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.hf.headers import read_headers
from megatron_dgrpo.errors import TransferError, listing
from megatron_dgrpo.rollout import fp8_loading
from megatron_dgrpo.rollout.buckets import map_shared, piece_shape, rows_of
from megatron_dgrpo.rollout.checksum import partial_checksum
from megatron_dgrpo.rollout.fp8_format import with_scales
from megatron_dgrpo.rollout.loading import Place, copy_rows, find_places, whereabouts
from megatron_dgrpo.rollout.packed_linear import packed_weights


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    path: str
    num_bytes: int
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    source: str = "file"
    """Of `BeginUpdate`."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)
    """(start, stop) for each name; none: whole tensors."""
    abandon: bool = False
    """Give the update up. vLLM ends an update when a part of it raises, and in no other way."""


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        packed = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
        if packed:
            raise TransferError(
                listing(
                    "vLLM has packed weights so that new ones cannot be written into them; the plugin of this package "
                    "has not run in an engine host (is the package installed, and VLLM_PLUGINS unset?):",
                    packed,
                )
            )
        headers = read_headers(self.model_config.model)
        self._shapes = {name: header.shape for name, header in headers.items() if "rotary_emb." not in name}
        if self.model_config.quantization == "fp8":
            self._shapes = with_scales(self._shapes)
        self._optional = _aliases(model) & self._shapes.keys()
        self._packed = packed_weights(model)
        self._manifest: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._places: dict[str, list[Place]] = {}
        self._found_for: tuple[Any, Any] = None, None  # the manifest and the parameters' places that these are for
        self._next_row: dict[str, int] = {}  # of each tensor that has not come whole; rows come in order
        self.copied_bytes = 0
        """Of this rank, in the update that is under way or was the last."""
        self._mapped: mmap.mmap | None = None

    # ---- vLLM's calls ----

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        problems = self._problems(init_info)
        if problems:
            raise TransferError(
                listing(f"The weights offered do not fit the engine's model, {self.model_config.model}:", problems)
            )
        self._unmap()
        self._map(init_info)
        manifest = {
            name: (tuple(shape), getattr(torch, dtype))
            for name, shape, dtype in zip(init_info.names, init_info.shapes, init_info.dtypes, strict=True)
        }
        found_for = manifest, whereabouts(self.model)
        if not self._places or found_for != self._found_for:
            self._places = {}
            places = find_places(self.model, manifest)
            fp8_loading.check_places(places, manifest)
            self._places, self._found_for = places, found_for
        self._manifest = manifest

    def start_weight_update(self) -> None:
        if not self._manifest:
            raise TransferError("An update was started before its manifest was given")
        self._next_row = dict.fromkeys(self._manifest, 0)
        self.copied_bytes = 0

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        if update_info.abandon:
            self._unmap()
            raise TransferError("The update was given up")
        info = update_info
        unknown = [name for name in info.names if name not in self._next_row]
        if unknown:
            raise TransferError(listing("These tensors were not announced, or came before:", unknown))
        whole = self._buckets(info)
        rows = info.rows or [(0, rows_of(self._manifest[name][0])) for name in info.names]
        pieces = [
            (name, start, self._view(whole, name, start, stop, offset))
            for name, (start, stop), offset in zip(info.names, rows, info.offsets, strict=True)
        ]
        self._verify(pieces, info.checksums)
        points.reached("engine.bucket")
        for weight in self._packed:
            weight.tear()
        for name, start, piece in pieces:
            if start != self._next_row.get(name):
                raise TransferError(f"{name}: its rows from {start} on came, which is not where it was left")
            self.copied_bytes += copy_rows(self._places[name], start, piece) * piece.element_size()
            self._next_row[name] = start + rows_of(piece.shape)
            if self._next_row[name] == rows_of(self._manifest[name][0]):
                del self._next_row[name]

    def finish_weight_update(self) -> None:
        if self._next_row:
            raise TransferError(
                listing("These tensors never came whole, so the engine has old weights:", sorted(self._next_row))
            )
        points.reached("engine.finish")
        for weight in self._packed:
            weight.whole()
        self._pack_experts()
        if whereabouts(self.model) != self._found_for[1]:
            self._places = {}  # of memory that has been left, and should be given back
        self._unmap()

    def shutdown(self) -> None:
        self._unmap()

    def _pack_experts(self) -> None:
        for module in self.model.modules():
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None and hasattr(module, "w13_weight"):
                kernel.fused_experts.process_weights_after_loading(module)

    # ---- where the buckets lie ----

    def _map(self, init_info: SharedMemoryInit) -> None:
        if init_info.source not in ("file", "inbox"):
            raise TransferError(f"Weights cannot come to this engine by {init_info.source!r}")
        flags = os.O_NOFOLLOW if init_info.source == "file" else 0  # an inbox is an open file of the host's
        try:
            descriptor = os.open(init_info.path, os.O_RDWR | flags)
        except OSError as error:
            raise TransferError(
                f"The engine cannot open {init_info.path} ({error.strerror}): it must be on the trainer's node"
            ) from None
        try:
            if os.fstat(descriptor).st_size < init_info.num_bytes:
                raise TransferError(f"{init_info.path} has fewer than the {init_info.num_bytes} bytes announced")
            self._mapped = map_shared(descriptor, init_info.num_bytes)
        finally:
            os.close(descriptor)

    def _buckets(self, update_info: SharedMemoryUpdate) -> torch.Tensor:
        """All bytes of the two buckets; those that the update names are those of the trainer."""
        assert self._mapped is not None
        return torch.frombuffer(self._mapped, dtype=torch.uint8)

    # ---- checks ----

    def _problems(self, offered: SharedMemoryInit) -> list[str]:
        """Every way in which the manifest differs from the model."""
        problems = fp8_loading.problems(self.model, self.model_config.quantization)
        dtypes = fp8_loading.Dtypes(self.model, self.model_config.quantization)
        for name, shape, dtype in zip(offered.names, offered.shapes, offered.dtypes, strict=True):
            if name not in self._shapes:
                problems.append(f"{name}: the model has no such tensor")
                continue
            if tuple(shape) != self._shapes[name]:
                problems.append(f"{name}: its shape is {list(shape)}, the engine has {list(self._shapes[name])}")
            if dtype not in (has := dtypes.of(name, shape)):
                said = f"it is {dtype}, the engine has {', '.join(sorted(has))}"
                problems.append(f"{name}: {said}: give both sides one dtype, and one quantization")
        missing = self._shapes.keys() - set(offered.names) - self._optional
        problems += [f"{name}: it is missing" for name in sorted(missing)]
        if len(set(offered.names)) != len(offered.names):
            problems.append("some names are there twice")
        return problems

    def _view(self, whole: torch.Tensor, name: str, start: int, stop: int, offset: int) -> torch.Tensor:
        shape, dtype = self._manifest[name]
        if not 0 <= start <= stop <= rows_of(shape):
            raise TransferError(f"{name} has no rows {start} to {stop}")
        shape = piece_shape(shape, start, stop)
        num_bytes = math.prod(shape) * dtype.itemsize
        if offset < 0 or offset + num_bytes > len(whole):
            raise TransferError(f"{name} would lie outside of the file, at {offset}")
        return whole[offset : offset + num_bytes].view(dtype).view(shape)

    def _verify(self, pieces: list[tuple[str, int, torch.Tensor]], checksums: list[int]) -> None:
        if not checksums:
            return
        wrong = []
        for (name, start, piece), sent in zip(pieces, checksums, strict=True):
            shape = self._manifest[name][0]
            box = ((start, start + len(piece)), *((0, n) for n in shape[1:])) if shape else ()
            if partial_checksum(piece, box, shape) != sent:
                wrong.append(name)
        if wrong:
            raise TransferError(listing("These tensors did not arrive as they were sent (checksums differ):", wrong))

    def _unmap(self) -> None:
        if self._mapped is None:
            return
        mapped, self._mapped = self._mapped, None
        with contextlib.suppress(BufferError):  # a view is still referenced by a traceback; it goes with that
            mapped.close()


def _aliases(model: torch.nn.Module) -> set[str]:
    """Names of parameters that the model has under another name already."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in names if first.setdefault(id(parameter), name) != name}

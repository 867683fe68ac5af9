"""Weights of linear layers on CPU in the form that oneDNN multiplies fastest, in the memory that updates write to.

oneDNN's form of a weight W_NK is blocks of `width` rows, each transposed in units of four bytes:

    packed[n, k, r] = words[n * width + r, k]      words_NU: W_NK as 32-bit integers, U = K * itemsize / 4

A block has the bytes of its rows, in the same place, so a weight can be packed where it lies: block by block, through
a buffer of one block. The engine's parameter is a view of oneDNN's memory then. Nothing is allocated at an update, and
one form of the weight is there at a time. A head is packed beside its plain form, as vLLM does, which a tied embedding
needs. That oneDNN's form is this one is not assumed: when a model is loaded, each weight that oneDNN has packed itself
is compared with ours, byte for byte, and one that differs (other shapes, types, processors) stays plain.

A weight's life:

    PACKED --first bytes of an update--> TORN --update whole--> PLAIN --first product--> PACKED

It is packed at the first product, and not as its bytes come: transposing takes three times as long as copying, and who
sends weights would wait for it. A torn weight, old and packed in parts and new and plain in others, is never multiplied.

vLLM packs with handlers of its own, into memory that oneDNN allocates and nobody can write to. Packing those again at
each update means new pages for weights of 32 MiB and more, which is ten times slower than memory already touched.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import torch

from megatron_dgrpo.errors import TransferError

_WIDTHS = (64, 48, 32, 16)
_WORD = torch.int32


class Form(enum.Enum):
    PACKED = enum.auto()
    TORN = enum.auto()
    PLAIN = enum.auto()


class PackedWeight:
    """What vLLM calls in place of a linear function: x @ weight.T + bias."""

    def __init__(self, opaque: torch.Tensor, memory_NK: torch.Tensor, width: int, in_place: bool) -> None:
        self.form = Form.PACKED
        self.in_place = in_place
        self.times_packed = 1
        self._opaque, self._memory_NK = opaque, memory_NK
        self._width = width

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.form is not Form.PACKED:
            self.pack(weight)
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], len(self._memory_NK))
        return torch.ops.mkldnn._linear_pointwise(x, self._opaque, bias, "none", [], "")  # type: ignore[no-any-return]

    def tear(self) -> None:
        """Bytes of an update come."""
        self.form = Form.TORN

    def whole(self) -> None:
        """All bytes have come."""
        if self.form is Form.TORN:
            self.form = Form.PLAIN

    def pack(self, weight: torch.Tensor) -> None:
        if self.form is Form.TORN:
            raise TransferError("A linear layer has parts of two versions: nothing is computed until an update is whole")
        source_NU = self._memory_NK if self.in_place else _plain(weight)
        source_NU, target_NU = source_NU.view(_WORD), self._memory_NK.view(_WORD)
        buffer = source_NU.new_empty(source_NU.shape[1], self._width)
        for rows, block in zip(source_NU.split(self._width), target_NU.split(self._width), strict=True):
            buffer.copy_(rows.t())
            block.view_as(buffer).copy_(buffer)
        self.form = Form.PACKED
        self.times_packed += 1


def pack(layer: Any, in_place: bool) -> PackedWeight | None:
    """Pack a layer's weight that has just been loaded; None if it stays plain."""
    weight_NK = _plain(layer.weight)
    if not _can_multiply(weight_NK):
        return None
    opaque = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)
    if torch.ops.mkldnn._nbytes(opaque) != weight_NK.nbytes:
        return None  # padded
    memory_NK = _memory_of(opaque).view(weight_NK.dtype).view(weight_NK.shape)
    width = _width(weight_NK, memory_NK)
    if width is None:
        return None
    if in_place:
        layer.weight.data = memory_NK
    return PackedWeight(opaque, memory_NK, width, in_place)


def packed_weights(model: torch.nn.Module) -> list[PackedWeight]:
    found = [vars(module).get("cpu_linear") for module in model.modules()]
    return [one for one in found if isinstance(one, PackedWeight)]


def _can_multiply(weight_NK: torch.Tensor) -> bool:
    """Whether this build of torch and this processor have oneDNN's products of the weight's type."""
    if not torch.backends.mkldnn.is_available() or weight_NK.is_meta or not weight_NK.is_contiguous():
        return False
    if weight_NK.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight_NK.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight_NK.dtype == torch.float32


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """A plain tensor: vLLM's parameters have Python code for every operation on them."""
    return weight.detach().as_subclass(torch.Tensor)


def _memory_of(opaque: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in oneDNN's form, which live as long as anybody uses them."""
    size = int(torch.ops.mkldnn._nbytes(opaque))
    kind = type("Memory", (ctypes.c_ubyte * size,), {})  # of a class of its own, it can have an attribute
    buffer: Any = kind.from_address(torch.ops.mkldnn.data_ptr(opaque))  # type: ignore[attr-defined]
    buffer.owner = opaque
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _width(plain_NK: torch.Tensor, packed_NK: torch.Tensor) -> int | None:
    """Of the blocks in which the one is the other; None if it is not."""
    if plain_NK.shape[1] * plain_NK.element_size() % _WORD.itemsize:
        return None
    plain_NU, packed_NU = plain_NK.view(_WORD), packed_NK.view(_WORD)
    for width in _WIDTHS:
        if len(plain_NU) % width == 0 and all(
            torch.equal(rows.t(), block.view(-1, width))
            for rows, block in zip(plain_NU.split(width), packed_NU.split(width), strict=True)
        ):
            return width
    return None

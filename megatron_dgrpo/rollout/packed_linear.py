"""Weights of linear layers on CPU in the form that oneDNN multiplies fastest, in the memory that updates write to.

oneDNN's form of a weight W_NK is blocks of `width` rows, each transposed in units of four bytes:

    packed[n, k, r] = words[n * width + r, k]      words_NU: W_NK as 32-bit integers, U = K * itemsize / 4

A block has the bytes of its rows, in the same place, so a weight can be packed where it lies: block by block, through
a buffer of one block. The engine's parameter is a view of oneDNN's memory then. Nothing is allocated at an update, and
one form of the weight is there at a time. A head is packed beside its plain form, as vLLM does, which a tied embedding
needs; there, the last block may have room to spare. That oneDNN's form is this one is not assumed: when a model is
loaded, each weight that oneDNN has packed itself is compared with ours, byte for byte, and one that differs (rows that
fill no block, other types, other processors) stays plain.

A weight's life:

    PACKED --first bytes of an update--> TORN --update whole--> PLAIN --first product--> PACKED

It is packed at the first product, and not as its bytes come: transposing takes three times as long as copying, and who
sends weights would wait for it. A torn weight, in parts old and packed, in others new and plain, is never multiplied.

vLLM packs with handlers of its own, into memory that oneDNN allocates and nobody can write to. Packing those again at
each update means new pages for weights of 32 MiB and more, which is ten times slower than memory already touched.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Iterator
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

    def __init__(self, opaque: torch.Tensor, memory_MK: torch.Tensor, width: int, in_place: bool) -> None:
        self.form = Form.PACKED
        self.in_place = in_place
        self.times_packed = 1
        self._opaque, self._memory_MK, self._width = opaque, memory_MK, width

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.form is not Form.PACKED:
            self.pack(weight)
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], len(self._opaque))
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
            raise TransferError("A linear layer has parts of two versions, and waits for an update to be whole")
        source_NK = self._memory_MK if self.in_place else _plain(weight)
        for rows, block in _blocks(source_NK, self._memory_MK, self._width):
            block.copy_(rows.clone())  # they may be the very bytes that are written; and a cache holds them
        self.form = Form.PACKED
        self.times_packed += 1


def pack(layer: Any, in_place: bool) -> PackedWeight | None:
    """Pack a layer's weight that has just been loaded; None if it stays plain."""
    weight_NK = _plain(layer.weight)
    if not _can_multiply(weight_NK):
        return None
    opaque = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)
    memory = _memory_of(opaque)
    if torch.equal(weight_NK, weight_NK[:1].expand_as(weight_NK)):
        return None  # of equal rows, of zeros: it would look the same in many forms
    for width in _WIDTHS:
        num_rows = -(-len(weight_NK) // width) * width
        if len(memory) != num_rows * weight_NK[:1].nbytes or (in_place and num_rows != len(weight_NK)):
            continue
        memory_MK = memory.view(weight_NK.dtype).view(num_rows, -1)
        if all(torch.equal(rows.contiguous(), block) for rows, block in _blocks(weight_NK, memory_MK, width)):
            if in_place:
                layer.weight.data = memory_MK
            return PackedWeight(opaque, memory_MK, width, in_place)
    return None


def packed_weights(model: torch.nn.Module) -> list[PackedWeight]:
    found = [vars(module).get("cpu_linear") for module in model.modules()]
    return [one for one in found if isinstance(one, PackedWeight)]


def _can_multiply(weight_NK: torch.Tensor) -> bool:
    """Whether this build of torch and this processor have oneDNN's products of the weight's type."""
    if not torch.backends.mkldnn.is_available() or weight_NK.is_meta or not weight_NK.is_contiguous():
        return False
    if weight_NK[:1].nbytes % _WORD.itemsize:
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


def _blocks(plain_NK: torch.Tensor, packed_MK: torch.Tensor, width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What a block is of, transposed, and the block, both as words."""
    pairs = zip(plain_NK.view(_WORD).split(width), packed_MK.view(_WORD).split(width), strict=True)
    return ((rows_RU.t(), block.view(-1, width)[:, : len(rows_RU)]) for rows_RU, block in pairs)

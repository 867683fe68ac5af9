"""Parts of tensors out of a folder of safetensors whose headers are known."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch

from megatron_dgrpo.checkpoint.blocks import Blocks, Box, Stored
from megatron_dgrpo.checkpoint.hf.headers import TensorHeader
from megatron_dgrpo.errors import ConversionError


class SafetensorsFolder:
    """Use it as a context: the files are open while it is."""

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        self._headers = headers
        self._blocks = Blocks()

    def __enter__(self) -> Self:
        self._blocks.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._blocks.__exit__(kind, error, trace)

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._headers[name].dtype or "")

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The part `box` of a tensor."""
        part = torch.empty([stop - start for start, stop in box], dtype=self.dtype(name))
        self.read_into(name, box, part)
        return part

    def read_into(self, name: str, box: Box, target: torch.Tensor) -> None:
        """Fill `target`, of any type and on any device, with the part `box` of a tensor."""
        header = self._headers[name]
        try:
            self._blocks.read_into(Stored(header.file, header.start, self.dtype(name), header.shape), box, target)
        except OSError as error:
            raise ConversionError(f"{name} can't be read from {header.file} ({error}): copy the file again") from error

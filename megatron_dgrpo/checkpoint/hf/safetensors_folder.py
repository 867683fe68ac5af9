"""Reading parts of tensors from a folder of safetensors whose headers are known."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from megatron_dgrpo.checkpoint.hf.headers import TensorHeader


class SafetensorsFolder:
    """Use it as a context: the files are mapped while it is open."""

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        self._headers = headers
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, name: str, box: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """The part `box` of a tensor: (start, stop) on every axis."""
        path = self._headers[name].file
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path].get_slice(name)[tuple(slice(start, stop) for start, stop in box)]

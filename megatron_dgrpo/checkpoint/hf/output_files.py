"""Safetensors files whose every byte has its place before any is written.

Tensors are put into files in the order of the export, a new file whenever the next would grow beyond the bound. The
headers then follow from names, shapes and types alone, so any part of any tensor can be written at any time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dgrpo.checkpoint.hf.headers import DTYPES
from megatron_dgrpo.checkpoint.hf.shards import WeightSpec

_CODES = {getattr(torch, name): code for code, name in DTYPES.items()}


@dataclass
class OutputFile:
    name: str
    tensors: list[int] = field(default_factory=list)
    """Their places in the manifest."""
    starts: dict[int, int] = field(default_factory=dict)
    """Where in the file each begins."""
    header: bytes = b""
    size: int = 0


def nbytes(spec: WeightSpec) -> int:
    return math.prod(spec.global_shape) * spec.dtype.itemsize


def plan_files(specs: Sequence[WeightSpec], max_bytes: int) -> list[OutputFile]:
    """A tensor larger than `max_bytes` has a file of its own."""
    groups: list[list[int]] = [[]]
    filled = 0
    for place, spec in enumerate(specs):
        if groups[-1] and filled + nbytes(spec) > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(place)
        filled += nbytes(spec)
    if len(groups) == 1:
        return [_file("model.safetensors", specs, groups[0])]
    names = (f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups)))
    return [_file(name, specs, places) for name, places in zip(names, groups, strict=True)]


def _file(name: str, specs: Sequence[WeightSpec], places: list[int]) -> OutputFile:
    file, end = OutputFile(name, places), 0
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    # the widest types first, as the format's own writer has them: then all are aligned
    for place in sorted(places, key=lambda place: -specs[place].dtype.itemsize):
        spec = specs[place]
        entries[spec.hf_name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.global_shape),
            "data_offsets": [end, end + nbytes(spec)],
        }
        file.starts[place] = end
        end += nbytes(spec)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.header = struct.pack("<Q", len(text)) + text
    file.starts = {place: len(file.header) + start for place, start in file.starts.items()}
    file.size = len(file.header) + end
    return file


def index_json(specs: Sequence[WeightSpec], files: Sequence[OutputFile]) -> bytes:
    """model.safetensors.index.json of several files."""
    weight_map = {specs[place].hf_name: file.name for file in files for place in file.tensors}
    total = sum(nbytes(spec) for spec in specs)
    parameters = sum(math.prod(spec.global_shape) for spec in specs)
    metadata = {"total_parameters": parameters, "total_size": total}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()

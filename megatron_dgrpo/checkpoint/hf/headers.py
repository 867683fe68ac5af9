"""What a folder of safetensors holds, from the files' headers alone. Imports no torch: a launcher checks folders, too.

A safetensors file is the length of its header (u64), the header (JSON: name -> dtype, shape, data_offsets), the data. A
file that was cut short has a whole header and ends before its last tensor does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgrpo.checkpoint.hf.mapping import Rule
from megatron_dgrpo.errors import ConversionError, listing
from megatron_dgrpo.model.spec import ModelSpec

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    file: Path
    dtype: str | None
    """torch's name of the type; None for one that no model here uses."""
    shape: tuple[int, ...]


def read_headers(folder: str | Path) -> dict[str, TensorHeader]:
    """Every tensor of a folder by its name. What can't be read is listed in one error."""
    folder, problems = Path(folder), []
    found: dict[str, TensorHeader] = {}
    for path in (folder / name for name in _file_names(folder)):
        try:
            for name, entry in _entries(path).items():
                if name in found:
                    problems.append(f"{name} is in two files, {found[name].file.name} and {path.name}")
                found[name] = TensorHeader(path, _DTYPES.get(entry["dtype"]), tuple(entry["shape"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path.name} is truncated or damaged ({error}): copy it again")
    if problems:
        raise ConversionError(listing(f"the weights in {folder} can't be read:", problems))
    return found


def _file_names(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise ConversionError(
                f"{folder} has neither model.safetensors nor {_INDEX}: weights in other formats must be saved as "
                "safetensors first"
            )
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is not a safetensors index ({error!r}): copy the folder again") from None
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ConversionError(listing(f"{index} names files that are not there:", missing))
    return names


def _entries(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != end:
        raise ValueError(f"it has {size} bytes, its header says {end}")
    return entries


def check_tensors(folder: str | Path, table: Iterable[Rule], spec: ModelSpec) -> dict[str, TensorHeader]:
    """The headers, once they fit the model: every missing, extra, misshapen or wrongly typed tensor is in one error."""
    headers = read_headers(folder)
    expected = {rule.hf_name: rule.hf_shape for rule in table}
    problems = [f"{name} is missing" for name in expected if name not in headers]
    # a tied model's file may hold the head as well; it is the embedding again
    extra = headers.keys() - expected.keys() - ({"lm_head.weight"} if spec.tied else set())
    problems += [f"{name} is not a tensor of {spec.architecture}" for name in sorted(extra)]
    for name in (name for name in expected if name in headers):
        if headers[name].shape != expected[name]:
            problems.append(
                f"{name} has shape {list(headers[name].shape)}, config.json makes it {list(expected[name])}"
            )
        if headers[name].dtype is None:
            problems.append(f"{name} is neither bfloat16, float16, float32 nor float64")
    if problems:
        raise ConversionError(listing(f"the weights in {folder} do not fit its config.json:", problems))
    return headers

"""What a folder of safetensors holds, from the files' headers alone. Imports no torch: a launcher checks folders, too.

A safetensors file is the length of its header (u64), the header (JSON: name -> dtype, shape, data_offsets), the data:
the tensors one behind the other, without gaps. A file that was cut short has a whole header and ends before its last
tensor does. All of that is checked before a byte of data is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgrpo.checkpoint.hf.mapping import Rule
from megatron_dgrpo.errors import ConversionError, listing
from megatron_dgrpo.model.spec import ModelSpec

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    file: Path
    dtype: str | None
    """torch's name of the type; None for one that no model here uses."""
    shape: tuple[int, ...]
    start: int
    """Where its data begin in the file."""


def read_headers(folder: str | Path) -> dict[str, TensorHeader]:
    """Every tensor of a folder by its name. What can't be read is listed in one error."""
    folder, problems = Path(folder), []
    found: dict[str, TensorHeader] = {}
    names, mapped = _file_names(folder)
    for path in (folder / name for name in names):
        try:
            base, entries = _entries(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            words = f"an entry of its header lacks {error}" if isinstance(error, KeyError) else error
            problems.append(f"{path.name} is truncated or damaged ({words}): copy it again")
            mapped = {name: file for name, file in mapped.items() if file != path.name}
            continue
        for name, entry in entries.items():
            if name in found:
                problems.append(f"{name} is in two files, {found[name].file.name} and {path.name}")
            start = base + entry["data_offsets"][0]
            found[name] = TensorHeader(path, DTYPES.get(entry["dtype"]), tuple(entry["shape"]), start)
    problems += [
        f"{name} should be in {file} by the index, and is {f'in {found[name].file.name}' if name in found else 'not'}"
        for name, file in mapped.items()
        if name not in found or found[name].file.name != file
    ]
    if problems:
        raise ConversionError(listing(f"the weights in {folder} can't be read:", problems))
    return found


def _file_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files, and which tensor the index says is in which."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise ConversionError(
                f"{folder} has neither model.safetensors nor {INDEX}: weights in other formats must be saved as "
                "safetensors first"
            )
        return ["model.safetensors"], {}
    try:
        mapped = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(mapped.values()))
        strange = [name for name in names if Path(name).name != name]
        if strange:
            raise ValueError(f"{strange[0]!r} is not the name of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{index} is not a safetensors index ({error!r}): copy the folder again") from None
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ConversionError(listing(f"{index} names files that are not there:", missing))
    return names, mapped


def _entries(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the checked entries of a file's header."""
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
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end or last < first:
            raise ValueError(f"its header puts {name} at bytes {first} to {last}, where {end} is next")
        if not all(isinstance(length, int) and length >= 0 for length in entry["shape"]):
            raise ValueError(f"its header gives {name} the shape {entry['shape']}")
        item = _ITEM_BYTES.get(entry["dtype"])
        if item is not None and last - first != math.prod(entry["shape"]) * item:
            raise ValueError(f"its header gives {name} {last - first} bytes for {entry['shape']} of {entry['dtype']}")
        end = last
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes, its header says {8 + length + end}")
    return 8 + length, entries


def check_tensors(folder: str | Path, table: Iterable[Rule], spec: ModelSpec) -> dict[str, TensorHeader]:
    """The headers, once they fit the model: every missing, extra, misshapen or wrongly typed tensor is in one error."""
    headers = read_headers(folder)
    expected = {rule.hf_name: rule.hf_shape for rule in table}
    problems = [f"{name} is missing" for name in expected if name not in headers]
    # a tied model's file may hold the head as well; it is the embedding again
    extra = headers.keys() - expected.keys() - ({HEAD} if spec.tied else set())
    problems += [f"{name} is not a tensor of {spec.architecture}" for name in sorted(extra)]
    for name in (name for name in expected if name in headers):
        if headers[name].shape != expected[name]:
            problems.append(
                f"{name} has shape {list(headers[name].shape)}, config.json makes it {list(expected[name])}"
            )
        if headers[name].dtype is None:
            problems.append(f"{name} is neither bfloat16, float16, float32 nor float64")
    if spec.tied and HEAD in headers and headers[HEAD].shape != expected[EMBEDDING]:
        problems.append(f"{HEAD} has shape {list(headers[HEAD].shape)}, and config.json ties it to {EMBEDDING}")
    if problems:
        raise ConversionError(listing(f"the weights in {folder} do not fit its config.json:", problems))
    return headers

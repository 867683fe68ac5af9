"""Messages to bytes and back. Nothing is pickled: a message is data; decoding it runs no code of the sender's choice.

A message is a frozen dataclass that was registered; its annotations are its schema. Both sides check every field
against it, so that a wrong type fails where it is made and not three calls later on the other machine. Allowed are str,
int, float, bool, None, numpy arrays, other registered dataclasses, and tuples, lists and string-keyed mappings of
these.

A frame is

    magic (4) | length of the JSON (u32) | length of the blobs (u64) | JSON | blobs | MAC (32)

in little-endian order. Arrays are blobs, raw and little-endian; everything else is JSON. The MAC is blake2b over all
that stands before it and a sequence number. With a key it authenticates (`wire`), without one it is a checksum: the
same frames serve as records of a journal or values of a store.
"""

from __future__ import annotations

import hmac
import json
import struct
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.packing.trajectory import Segment, Trajectory

HEADER = struct.Struct("<4sIQ")
MAC_BYTES = 32
MAX_FRAME_BYTES = 2**30
MAGIC = b"dgM1"
_ARRAYS = frozenset("|b1 |i1 |u1 <i2 <u2 <i4 <u4 <i8 <u8 <f2 <f4 <f8".split())
_NONE = type(None)

_registry: dict[str, type] = {}
_schemas: dict[type, tuple[tuple[str, Any], ...]] = {}


def register[Message](cls: type[Message]) -> type[Message]:
    """Make a frozen dataclass a message. Usable as a decorator."""
    assert is_dataclass(cls) and cls.__dataclass_params__.frozen, f"{cls.__name__} is not a frozen dataclass"  # type: ignore[attr-defined]
    known = _registry.setdefault(cls.__name__, cls)
    assert known is cls, f"two messages are named {cls.__name__}"
    return cls


def _schema(cls: Any) -> tuple[tuple[str, Any], ...]:
    if cls not in _schemas:
        hints = typing.get_type_hints(cls)
        _schemas[cls] = tuple((f.name, hints[f.name]) for f in fields(cls))
    return _schemas[cls]


def _said(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _wrong(where: str, kind: Any, value: Any) -> RolloutError:
    return RolloutError(f"{where} must be {_said(kind)}, not {type(value).__name__}")


def _is_sequence(origin: Any) -> bool:
    return origin in (tuple, list)


def _plain(kind: Any, value: Any) -> bool:
    """Whether a sequence holds nothing but numbers or texts, as it should: buckets of weights come with thousands."""
    element, *more = typing.get_args(kind) or (None,)
    any_length = more == [Ellipsis] or typing.get_origin(kind) is list
    return any_length and element in (int, str) and all(type(item) is element for item in value)


def _items(kind: Any, value: Any, where: str) -> list[tuple[Any, Any]]:
    """The element types of a tuple or list annotation beside the elements of a value."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is list or (len(args) == 2 and args[1] is Ellipsis):
        return [(args[0], item) for item in value]
    if len(args) != len(value):
        raise RolloutError(f"{where} must have {len(args)} items, not {len(value)}")
    return list(zip(args, value, strict=True))


# ---- to JSON and blobs ----


def _pack(kind: Any, value: Any, where: str, blobs: list[bytes]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(kind) if _fits(arm, value)]
        if not arms:
            raise _wrong(where, kind, value)
        return _pack(arms[0], value, where, blobs)
    if not _fits(kind, value):
        raise _wrong(where, kind, value)
    if kind is float:
        return float(value)
    if kind is np.ndarray:
        return _pack_array(value, where, blobs)
    if _is_sequence(origin):
        if _plain(kind, value):
            return list(value)
        return [_pack(k, item, f"{where}[{i}]", blobs) for i, (k, item) in enumerate(_items(kind, value, where))]
    if isinstance(value, Mapping):
        return {key: _pack(typing.get_args(kind)[1], item, f"{where}[{key!r}]", blobs) for key, item in value.items()}
    if is_dataclass(kind):
        return _pack_message(value, blobs)
    return value


def _pack_message(message: Any, blobs: list[bytes]) -> list[Any]:
    name = type(message).__name__
    if _registry.get(name) is not type(message):
        raise RolloutError(f"{name} is not a registered message")
    return [name, {f: _pack(kind, getattr(message, f), f"{name}.{f}", blobs) for f, kind in _schema(type(message))}]


def _pack_array(array: np.ndarray, where: str, blobs: list[bytes]) -> dict[str, Any]:
    little = array.dtype.newbyteorder("<")
    if little.str not in _ARRAYS:
        raise RolloutError(f"{where} is an array of {array.dtype}; numbers and bools of fixed width can be sent")
    blobs.append(np.ascontiguousarray(array, dtype=little).tobytes())
    return {"dtype": little.str, "shape": list(array.shape)}


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind, its contents aside."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(arm, value) for arm in typing.get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is None or kind is _NONE:
        return value is None
    if kind in (int, str, bool, np.ndarray) or is_dataclass(kind):
        return type(value) is kind
    if _is_sequence(origin):
        return isinstance(value, origin)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    raise AssertionError(f"messages cannot have fields of type {_said(kind)}")


# ---- and back ----


def _unpack(kind: Any, value: Any, where: str, take: Callable[[int, str], bytes]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(kind) if _json_fits(arm, value)]
        if not arms:
            raise _wrong(where, kind, value)
        return _unpack(arms[0], value, where, take)
    if not _json_fits(kind, value):
        raise _wrong(where, kind, value)
    if kind is float:
        return float(value)
    if kind is np.ndarray:
        return _unpack_array(value, where, take)
    if _is_sequence(origin):
        if _plain(kind, value):
            return origin(value)
        items = [_unpack(k, item, f"{where}[{i}]", take) for i, (k, item) in enumerate(_items(kind, value, where))]
        return origin(items)
    if isinstance(value, dict):
        return {key: _unpack(typing.get_args(kind)[1], item, f"{where}[{key!r}]", take) for key, item in value.items()}
    if is_dataclass(kind):
        return _unpack_message(value, take)
    return value


def _unpack_message(value: Any, take: Callable[[int, str], bytes]) -> Any:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)):
        raise RolloutError("a message must be its name and its fields")
    name, content = value
    cls = _registry.get(name)
    if cls is None:
        raise RolloutError(f"{name!r} is not a known message: both sides must run the same version of this package")
    schema = _schema(cls)
    expected = {f for f, _ in schema}
    if expected != content.keys():
        missing, unknown = sorted(expected - content.keys()), sorted(content.keys() - expected)
        raise RolloutError(
            f"{name} has missing fields {missing} and unknown fields {unknown}: both sides must run the same version"
        )
    return cls(**{f: _unpack(kind, content[f], f"{name}.{f}", take) for f, kind in schema})


def _unpack_array(value: dict[str, Any], where: str, take: Callable[[int, str], bytes]) -> np.ndarray:
    dtype, shape = value.get("dtype"), value.get("shape")
    if value.keys() != {"dtype", "shape"} or dtype not in _ARRAYS or not isinstance(shape, list):
        raise RolloutError(f"{where} is not the description of an array")
    if not all(type(n) is int and 0 <= n <= MAX_FRAME_BYTES for n in shape):
        raise RolloutError(f"{where} has an impossible shape")
    count = 1
    for n in shape:
        count *= n
    data = take(count * np.dtype(dtype).itemsize, where)
    return np.frombuffer(data, dtype).reshape(shape).copy()  # the copy is aligned, and may be written to


def _json_fits(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_json_fits(arm, value) for arm in typing.get_args(kind))
    if kind is np.ndarray:
        return isinstance(value, dict)
    if _is_sequence(origin):
        return isinstance(value, list)
    if is_dataclass(kind):
        return isinstance(value, list) and len(value) == 2 and value[0] == kind.__name__  # type: ignore[union-attr]
    return _fits(kind, value)


# ---- frames ----


def _mac(key: bytes, sequence: int, content: bytes | memoryview) -> bytes:
    digest = blake2b(struct.pack("<Q", sequence), key=key, digest_size=MAC_BYTES)
    digest.update(content)
    return digest.digest()


def encode(message: Any, *, key: bytes = b"", sequence: int = 0) -> bytes:
    """A registered message as one frame."""
    blobs: list[bytes] = []
    text = json.dumps(_pack_message(message, blobs), separators=(",", ":")).encode()
    num_blob_bytes = sum(map(len, blobs))
    content = b"".join([HEADER.pack(MAGIC, len(text), num_blob_bytes), text, *blobs])
    if len(content) + MAC_BYTES > MAX_FRAME_BYTES:
        raise RolloutError(
            f"a {type(message).__name__} of {len(content)} bytes is more than a frame's {MAX_FRAME_BYTES}: split it"
        )
    return content + _mac(key, sequence, content)


def frame_length(header: bytes | bytearray | memoryview) -> int:
    """The whole length of the frame that begins with this header."""
    magic, text, blobs = HEADER.unpack_from(header)
    if magic != MAGIC:
        raise RolloutError("this is not a frame of messages")
    length = HEADER.size + text + blobs + MAC_BYTES
    if length > MAX_FRAME_BYTES:
        raise RolloutError(f"a frame of {length} bytes was announced; {MAX_FRAME_BYTES} is the limit")
    return length


def decode(frame: bytes | bytearray | memoryview, *, key: bytes = b"", sequence: int = 0) -> Any:
    """The message of one whole frame. Nothing of it is looked at before its MAC was found right."""
    view = memoryview(frame)
    if len(view) < HEADER.size + MAC_BYTES or frame_length(view) != len(view):
        raise RolloutError(f"a frame of {len(view)} bytes is truncated or too long")
    content = view[:-MAC_BYTES]
    if not hmac.compare_digest(_mac(key, sequence, content), bytes(view[-MAC_BYTES:])):
        raise RolloutError("a frame was damaged, forged, repeated or left out (its MAC is wrong)")
    _, num_text, _ = HEADER.unpack_from(view)
    try:
        value = json.loads(bytes(content[HEADER.size : HEADER.size + num_text]))
    except (ValueError, RecursionError) as error:
        raise RolloutError(f"a frame is not JSON ({error})") from None
    blobs, position = content[HEADER.size + num_text :], 0

    def take(count: int, where: str) -> bytes:
        nonlocal position
        if position + count > len(blobs):
            raise RolloutError(f"{where} is longer than what came with it")
        position += count
        return bytes(blobs[position - count : position])

    message = _unpack_message(value, take)
    if position != len(blobs):
        raise RolloutError(f"{len(blobs) - position} bytes of a frame belong to no field")
    return message


register(Segment)
register(Trajectory)

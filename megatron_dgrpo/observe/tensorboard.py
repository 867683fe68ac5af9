"""TensorBoard's event files, written without TensorBoard, torch or protobuf.

A file is a row of records: length (8 bytes, little-endian), masked CRC of the length, data, masked CRC of the
data. Data
is a protocol-buffer message `Event`; the fields that are used here:

    Event   1 wall_time (double)   2 step (varint)   3 file_version (text)   5 summary (Summary)
    Summary 1 value (Value, repeated)        Value   1 tag (text)   2 simple_value (float)

The CRC is CRC-32C (Castagnoli); masked: rotated right by 15 bits, plus 0xa282ead8.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_dgrpo import points

_LARGEST = 3.4028234e38  # of a float


def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        entries.append(byte)
    return tuple(entries)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


class EventFile:
    """A new file in a folder; TensorBoard shows all of a folder's files as one run."""

    def __init__(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = Path(folder) / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._file = points.open_file("tensorboard.open", self.path, flags)
        self._write(time.time(), _bytes_field(3, b"brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float], moment: float) -> None:
        """One event with a figure per tag."""
        summary = b"".join(
            _bytes_field(
                1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", max(-_LARGEST, min(_LARGEST, value)))
            )
            for tag, value in values.items()
        )
        self._write(moment, b"\x10" + _varint(step) + _bytes_field(5, summary))

    def _write(self, moment: float, rest: bytes) -> None:
        data = b"\x09" + struct.pack("<d", moment) + rest
        length = struct.pack("<Q", len(data))
        crc = struct.Struct("<I").pack
        record = length + crc(masked_crc(length)) + data + crc(masked_crc(data))
        points.write("tensorboard.record", self._file, record)

    def close(self) -> None:
        os.close(self._file)

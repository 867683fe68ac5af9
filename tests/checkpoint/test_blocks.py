"""Parts of tensors in files, through a buffer that is smaller than they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dgrpo.checkpoint import blocks
from megatron_dgrpo.checkpoint.blocks import Blocks, Stored


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((), ()),
        ((50,), ((3, 41),)),
        ((37, 5), ((0, 37), (0, 5))),
        ((37, 5), ((4, 30), (1, 3))),
        ((1, 37, 5), ((0, 1), (11, 37), (0, 5))),
        ((3, 2, 9, 7), ((1, 3), (0, 2), (2, 8), (3, 7))),
        ((2, 40), ((1, 2), (7, 31))),
        ((0, 4), ((0, 0), (0, 4))),
    ],
)
@pytest.mark.parametrize("size", [16, 100, 1 << 20])
def test_a_part_of_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], box: blocks.Box, size: int
) -> None:
    monkeypatch.setattr(blocks, "_BUFFER_BYTES", size)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (tmp_path / "file").write_bytes(b"before" + whole.numpy().tobytes() + b"behind")
    target = torch.full([stop - start for start, stop in box], torch.nan, dtype=torch.float64)
    with Blocks() as reader:
        reader.read_into(Stored(tmp_path / "file", 6, torch.float32, shape), box, target)
        assert len(reader._buffer) <= max(size, 4 * max(shape, default=1)), "no more than a row of the last axis"
    assert torch.equal(target.float(), whole[tuple(slice(*bounds) for bounds in box)])


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(30))
    with Blocks() as reader, pytest.raises(OSError, match="it ends at byte 30"):
        reader.read_into(Stored(tmp_path / "file", 0, torch.float32, (8,)), ((0, 8),), torch.empty(8))

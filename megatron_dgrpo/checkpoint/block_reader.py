"""torch's reader of distributed checkpoints, but block by block.

torch's own reads a saved tensor whole before it copies the part that is asked for, and still holds the last one: two
embeddings, whatever the rank's own share. A saved tensor is what `torch.save` writes, a zip file that stores its
numbers as they are. The small part of it is loaded without the numbers, which says where they lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_dgrpo.checkpoint.blocks import Blocks, Stored


class BlockReader(FileSystemReader):
    """Reads tensors only: a plan that asks for objects, which are pickles, is refused."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with Blocks() as blocks:
            for item in sorted(plan.items, key=self._place):
                assert item.type == LoadItemType.TENSOR, f"{item.storage_index.fqn} is no tensor"
                box = tuple(
                    (start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                )
                target = planner.resolve_tensor(item).detach()
                blocks.read_into(self._stored(item), box, target)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> tuple[str, int]:
        info: Any = self.storage_data[item.storage_index]
        return info.relative_path, info.offset

    def _stored(self, item: ReadItem) -> Stored:
        info: Any = self.storage_data[item.storage_index]
        assert not info.transform_descriptors, "the tensors are stored as they are"
        path = Path(self.path) / info.relative_path
        with path.open("rb") as file:
            empty = torch.load(self._slice_file(file, info), map_location="meta", weights_only=True)
        within = empty.untyped_storage()._checkpoint_offset
        if within is None or not empty.is_contiguous():
            raise ValueError(f"{item.storage_index.fqn} is not stored as contiguous numbers")
        start = info.offset + within + empty.storage_offset() * empty.dtype.itemsize
        return Stored(path, start, empty.dtype, tuple(empty.shape))

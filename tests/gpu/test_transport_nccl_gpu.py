"""An engine on a GPU of its own: buckets are broadcast to it by rank 0, from one rank and from two."""

from __future__ import annotations

import pytest
import torch
from gpu_transports import Engine, assert_alike, fresh, make_folder, needs, push

pytestmark = needs(2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_by_broadcast(tmp_path, ranks: int) -> None:
    if torch.cuda.device_count() <= ranks:
        pytest.skip(f"needs {ranks + 1} CUDA devices")
    first, second = make_folder(str(tmp_path / "a"), 0), make_folder(str(tmp_path / "b"), 1)
    engine = Engine(first, str(ranks), sleeps=False)
    try:
        for version, folder in enumerate((second, first), 1):
            assert push("nccl", folder, engine, version, ranks) == [""] * ranks
            assert_alike(engine.answers(), fresh(folder, str(ranks)))
    finally:
        engine.close()

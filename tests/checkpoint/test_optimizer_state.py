"""The optimizer's ranges as boxes of the parameters, and what of it every layout finds again."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_dgrpo.checkpoint.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 3), (5, 1), (2, 3, 4), (1, 4, 3), (3, 1, 2, 2)], ids=str)
def test_a_range_is_a_few_boxes_that_cover_it_once(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    whole = np.arange(size).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        found = list(boxes(shape, start, stop))
        assert len(found) <= 2 * len(shape) - 1
        seen: list[int] = []
        for offsets, sizes, first in found:
            assert all(length > 0 for length in sizes)
            part = whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
            assert part.shape == sizes and part.flat[0] == first
            assert (np.diff(part.ravel()) == 1).all(), "they lie beside one another, so that a box is a view"
            seen += part.ravel().tolist()
        assert seen == list(range(start, stop)), (start, stop)

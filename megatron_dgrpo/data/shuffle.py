"""Orders that depend on numbers alone, drawn from the raw stream of a counter-based generator, which numpy keeps from
version to version."""

from __future__ import annotations

import numpy as np


def shuffled(count: int, seed: int, epoch: int, source: int = 0, block: int = 0) -> np.ndarray:
    """0 .. count - 1 in an order of their own for every epoch, source and block."""
    generator = np.random.Philox(
        key=np.asarray([seed, epoch], np.uint64), counter=np.asarray([0, 0, block, source], np.uint64)
    )
    return np.argsort(generator.random_raw(count), kind="stable")

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.train.dgrpo import _by_prompts


def test_updates_take_whole_groups_also_where_samples_were_dropped() -> None:
    of = {"a": 3, "b": 1, "c": 2, "d": 3, "e": 3}
    tokens = np.ones(1, np.int32)
    batch = [Trajectory(name, i, tokens, (Segment(tokens, True),), "stop") for name, n in of.items() for i in range(n)]
    shares = _by_prompts(batch, SimpleNamespace(updates_per_batch=2))
    assert [[t.prompt_id for t in share] for share in shares] == [["a"] * 3 + ["b"] + ["c"] * 2, ["d"] * 3 + ["e"] * 3]
    assert len(_by_prompts(batch[:3], SimpleNamespace(updates_per_batch=2))) == 1

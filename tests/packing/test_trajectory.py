from __future__ import annotations

from packing_samples import trajectory

from megatron_dgrpo.packing.trajectory import by_prompts


def test_shares_are_whole_groups_also_where_samples_are_missing() -> None:
    of = {"a": 3, "b": 1, "c": 2, "d": 3, "e": 3}
    batch = [trajectory(name, i, [1], ([2], True)) for name, n in of.items() for i in range(n)]
    shares = [[t.prompt_id for t in share] for share in by_prompts(batch, 2)]
    assert shares == [["a"] * 3 + ["b"] + ["c"] * 2, ["d"] * 3 + ["e"] * 3]
    assert len(by_prompts(batch[:3], 2)) == 1

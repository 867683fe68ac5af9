from __future__ import annotations

import pytest
from packing_samples import trajectory

from megatron_dgrpo.errors import DataError
from megatron_dgrpo.packing.limits import Limits, keep_fitting

LIMITS = Limits(room=12, room_setting="micro_batch_tokens=12", max_positions=10, vocab_size=50)
SHORT = trajectory("a", 0, [1, 2, 3], ([4, 49], True))
LONG = trajectory("b", 1, [1] * 8, ([4] * 3, True))
LONGER = trajectory("c", 2, [1] * 8, ([4] * 5, True))


def test_all_that_is_too_long_is_named_with_the_setting() -> None:
    with pytest.raises(DataError, match=r"(?s)on_overlong=drop.*sample 1 of prompt b has 11.*context of 10.*prompt c"):
        keep_fitting([SHORT, LONG, LONGER], LIMITS, "error")
    with pytest.raises(DataError, match="holds .12.: raise micro_batch_tokens=12"):
        keep_fitting([LONGER], Limits(12, "micro_batch_tokens=12", 100, 50), "error")


def test_dropped_ones_are_listed() -> None:
    found = keep_fitting([LONG, SHORT, LONGER], LIMITS, "drop")
    assert found.trajectories == [SHORT]
    assert [words.split(" has")[0] for words in found.dropped] == ["sample 1 of prompt b", "sample 2 of prompt c"]
    with pytest.raises(DataError, match="leaves nothing"):
        keep_fitting([LONG], LIMITS, "drop")
    part = keep_fitting([LONG], LIMITS, "drop", may_be_empty=True)
    assert part.trajectories == [] and len(part.dropped) == 1


def test_ids_outside_the_vocabulary_are_an_error_even_where_long_ones_are_dropped() -> None:
    with pytest.raises(DataError, match="sample 7 of prompt d has the id 50, of a vocabulary of 50"):
        keep_fitting([SHORT, trajectory("d", 7, [1], ([50], True))], LIMITS, "drop")

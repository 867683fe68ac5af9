from __future__ import annotations

import pytest

from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.exact_match import ExactMatch


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("v1", "v1", 1.0),
        (" v1\n", "\tv1 ", 1.0),
        ("v1", "v1 v1", 0.0),
        ("v1", "V1", 0.0),
        ("v1", "v1.", 0.0),
        ("v1", "v1\N{REPLACEMENT CHARACTER}", 0.0),
        ("a b", "a  b", 0.0),
        ("v1", "", 0.0),
    ],
)
def test_what_matches(answer: str, text: str, reward: float) -> None:
    row = PromptRow("r", "p", answer)
    assert ExactMatch().score([Sample(row, text), Sample(row, answer)]) == [reward, 1.0]

"""Exact match, contains, token F1, regular expressions."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.text import Contains, ExactMatch, Regex, TokenF1, f1


def sample(text: str, answer: str = "", **fields: Any) -> Sample:
    return Sample("d.jsonl:1", text, "a prompt", answer, fields)


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
def test_what_matches_exactly(answer: str, text: str, reward: float) -> None:
    scorer = ExactMatch(settings.ExactMatch(kind="exact_match"))
    assert scorer.score(sample(text, answer)) == reward


def test_exact_match_in_any_case_and_against_a_field() -> None:
    scorer = ExactMatch(settings.ExactMatch(kind="exact_match", ignore_case=True, reference="answers"))
    assert scorer.score(sample("STRASSE", answers=["weg", "straße"])) == 1.0
    assert scorer.score(sample("platz", answers=["weg", "straße"])) == 0.0
    assert scorer.score(sample("weg", answers="weg")) == 1.0
    for bad in ([], 3, ["a", None]):
        with pytest.raises(RewardError, match="'answers' is"):
            scorer.score(sample("weg", answers=bad))
    with pytest.raises(RewardError, match="no field 'answers'"):
        scorer.score(sample("weg"))


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("Paris", "It is paris, I think.", 1.0),
        ("Paris", "Parisian", 0.0),
        ("12", "It costs 120.", 0.0),
        ("12", "It costs 12.", 1.0),
        ("C++", "Use C++, not C.", 1.0),
        ("a.b", "acb", 0.0),
    ],
)
def test_what_contains(answer: str, text: str, reward: float) -> None:
    assert Contains(settings.Contains(kind="contains")).score(sample(text, answer)) == reward


def test_contains_any_or_all_of_several() -> None:
    some = Contains(settings.Contains(kind="contains", reference="keys"))
    every = Contains(settings.Contains(kind="contains", reference="keys", need="all"))
    parts = Contains(settings.Contains(kind="contains", whole_words=False, ignore_case=False))
    one, both = sample("red only", keys=["red", "blue"]), sample("blue and RED", keys=["red", "blue"])
    assert [some.score(one), every.score(one), some.score(both), every.score(both)] == [1, 0, 1, 1]
    assert some.score(sample("red", keys=[""])) == 0.0  # nothing is contained in no text
    assert [parts.score(sample("Parisian", "Paris")), parts.score(sample("parisian", "Paris"))] == [1, 0]


def test_token_f1_by_hand() -> None:
    # 3 words, 2 words, 2 shared: P = 2/3, R = 1
    assert f1("The cat, sat down!", "cat sat") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("a a x", "x") == 1.0  # articles do not count
    assert f1("x x x", "x") == pytest.approx(0.5)  # a word counts as often as it is in both
    assert f1("", "x") == f1("x", "") == 0.0 and f1("the", "an") == 1.0
    scorer = TokenF1(settings.TokenF1(kind="token_f1", reference="answers"))
    assert scorer.score(sample("big cat", answers=["dog", "a cat"])) == pytest.approx(2 / 3)


def test_regular_expressions() -> None:
    def score(text: str, answer: str = "", **changes: Any) -> float:
        return Regex(settings.Regex(kind="regex", **changes)).score(sample(text, answer))

    assert score("see <a>1</a> there", pattern=r"<a>\d</a>") == 1.0
    assert score("see <a>x</a> there", pattern=r"<a>\d</a>") == 0.0
    assert score(" <a>1</a>\n", pattern=r"<a>\d</a>", whole=True) == 1.0
    assert score("<a>1</a>.", pattern=r"<a>\d</a>", whole=True) == 0.0
    last = {"pattern": r"<a>(.*?)</a>", "equals_reference": True}
    assert score("<a>1</a> no, <a> 2 </a>", "2", **last) == 1.0
    assert score("<a>2</a> no, <a>1</a>", "2", **last) == 0.0
    assert score("2", "2", **last) == 0.0
    assert score("b", "a", pattern="(a)?b", equals_reference=True) == 0.0  # a group that took no part is empty
    with pytest.raises(RewardError, match="the row has no answer"):
        score("<a>2</a>", "", **last)

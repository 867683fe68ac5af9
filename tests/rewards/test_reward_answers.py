"""Numbers, letters of multiple choice, formulas."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Failure, Sample
from megatron_dgrpo.rewards.choice import Choice
from megatron_dgrpo.rewards.number import Number, last_boxed, last_number
from megatron_dgrpo.rewards.pool import RewardPool


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("from 1 to 2.5.", Fraction(5, 2)),
        ("$1,234,567.5", Fraction(2469135, 2)),
        ("1,234 and 5,67", 67),  # no groups of three: two numbers
        ("-3", -3),
        ("\N{MINUS SIGN}3", -3),
        ("3-4", 4),
        ("1e-4", Fraction(1, 10000)),
        ("2.5E3", 2500),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4 of it", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("4/0", None),
        ("12 %", 12),
        ("x2", None),
        ("none", None),
        ("", None),
        ("1" * 5000, None),  # no number that anybody asked for, and int() refuses it
    ],
)
def test_the_last_number_of_a_text(text: str, value: Any) -> None:
    assert last_number(text) == value


def test_boxes_are_balanced() -> None:
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} then \boxed{2") == "1"
    assert last_boxed("1") is None


def test_numbers_within_a_tolerance() -> None:
    def score(text: str, answer: str, **changes: Any) -> float:
        return Number(settings.Number(kind="number", **changes)).score(Sample("r", text, answer=answer))

    assert score("So 0.1 + 0.2 is 0.3", "0.30") == 1.0
    assert score("0.3001", "0.3") == 0.0 and score("0.3001", "0.3", tolerance=0.001) == 1.0
    assert score("101", "100", relative_tolerance=0.01) == 1.0 and score("102", "100", relative_tolerance=0.01) == 0.0
    assert score("It is 7, of 9.", "7") == 0.0
    assert score(r"\boxed{7}, of 9.", "#### 7", find="boxed") == 1.0
    assert score("7", "7", find="boxed") == 0.0
    assert score("no idea", "7") == 0.0
    assert score("9" * 400, "1e308") == 0.0  # beyond what a float holds
    with pytest.raises(RewardError, match="holds no number"):
        score("7", "seven")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("B. Because it is", "B"),
        ("B) because", "B"),
        ("The answer is C.", "C"),
        ("The correct answer is: **(D)**", "D"),
        ("Answer: A\n", "A"),
        ("The answer is B. No, wait: the answer is C", "C"),
        (r"\boxed{B}", "B"),
        (r"$\boxed{\text{B}}$", "B"),
        ("Of (A) and (B) I take (B)", "B"),
        ("The best choice is option D", "D"),
        ("A good idea would be to wait", None),
        ("The answer is a matter of taste", "A"),  # it cannot be told from "answer is a"
        ("The answer is Bob", None),
        ("E", None),  # four choices
        ("", None),
    ],
)
def test_the_letter_that_is_chosen(text: str, letter: str | None) -> None:
    assert Choice(settings.Choice(kind="choice")).chosen(text) == letter


def test_choices_against_the_answer() -> None:
    scorer = Choice(settings.Choice(kind="choice", num_choices=5))
    assert scorer.score(Sample("r", "It is (E)", answer="E")) == 1.0
    assert scorer.score(Sample("r", "It is (E)", answer="(D) all of it")) == 0.0
    with pytest.raises(RewardError, match="'Z' is none of the letters A to E"):
        scorer.score(Sample("r", "E", answer="Z"))


def test_mathematics() -> None:
    pytest.importorskip("math_verify", reason="math-verify, of the extra `rewards`, is not installed")
    from megatron_dgrpo.rewards.mathematics import Math

    scorer = Math(settings.Math(kind="math"))

    def score(text: str, answer: str) -> float:
        return scorer.score(Sample("r", text, answer=answer))

    assert score(r"Thus $\boxed{\frac{2}{4}}$.", "1/2") == 1.0
    assert score(r"Thus $\boxed{0.5}$.", r"$\frac{1}{2}$") == 1.0
    assert score(r"Thus $\boxed{0.51}$.", r"$\frac{1}{2}$") == 0.0
    assert score(r"$x^2+2x+1$", "$(x+1)^2$") == 1.0
    assert score("I do not know", "2") == 0.0
    assert score(r"$\frac{1}{$ \boxed{", "2") == 0.0
    assert score("", "2") == 0.0


def test_a_formula_without_end_is_a_failure_of_its_response_alone() -> None:
    pytest.importorskip("math_verify", reason="math-verify, of the extra `rewards`, is not installed")
    samples = [Sample("r", text, answer="1/2") for text in ("$0.5$", r"$9^{9^{9^{9}}}$", "$0.5$")]
    with RewardPool(1) as pool:
        first, endless, last = pool.score([settings.Math(kind="math", timeout_s=2.0)], samples)[0]
    assert first == last == 1.0 and endless == Failure("it took more than 2 s")


def test_mathematics_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from megatron_dgrpo.rewards.mathematics import Math

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RewardError, match="needs the package math-verify .* install the extra `rewards`"):
        Math(settings.Math(kind="math"))

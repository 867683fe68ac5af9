"""A number in the response against the reference's.

Numbers are read as people write them: 1,234.5, -3, 1e-4, 3/4, 12 % (which is 12), $5, with a true minus sign as well.
They are compared as exact fractions, so that 0.1 + 0.2 against 0.3 is no question of floating point.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample, references

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,1000})(?:\.\d{1,1000})?|\.\d{1,1000}"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+\u2212]?)\s?[$\u20ac\u00a3]?(?P<top>{_DIGITS})(?!\d)(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d))?"
    rf"(?:\s?/\s?(?P<bottom>\d{{1,100}})(?![\d/]))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")


def last_number(text: str) -> Fraction | None:
    """The last number of a text. A minus between digits ("3-4") is no sign: the last number is 4."""
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text.replace("{,}", ",").replace("\\$", "$"))
    found = None
    for match in _NUMBER.finditer(text):
        if match["bottom"] is None or int(match["bottom"]) != 0:
            found = match
    if found is None:
        return None
    value = Fraction(found["top"].replace(",", ""))
    if found["exponent"]:
        value *= Fraction(10) ** int(found["exponent"])
    if found["bottom"]:
        value /= int(found["bottom"])
    return -value if found["sign"] in ("-", "\u2212") else value


def last_boxed(text: str) -> str | None:
    """What the last whole \\boxed{...} holds, braces within it balanced."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for index in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : index]
        start = text.rfind("\\boxed{", 0, start)
    return None


class Number:
    def __init__(self, config: settings.Number) -> None:
        self._config = config

    def score(self, sample: Sample) -> float:
        wanted = []
        for reference in references(self._config, sample):
            value = last_number(reference)
            if value is None:
                raise RewardError(f"the reference {reference!r:.80} holds no number")
            wanted.append(value)
        text = last_boxed(sample.text) if self._config.find == "boxed" else sample.text
        given = last_number(text) if text is not None else None
        return float(given is not None and any(self._equal(given, value) for value in wanted))

    def _equal(self, given: Fraction, wanted: Fraction) -> bool:
        absolute, relative = Fraction(self._config.tolerance), Fraction(self._config.relative_tolerance)
        return abs(given - wanted) <= max(absolute, relative * abs(wanted))

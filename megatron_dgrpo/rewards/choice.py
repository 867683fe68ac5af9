"""The letter that a response to a multiple-choice question chooses.

What counts, in this order: the last "answer is X", "Answer: X" or \\boxed{X}; a response that is nothing but the
letter, or begins with it as "(B)", "B." or "B)"; the last letter in parentheses. A letter within a sentence ("A good
idea") is none.
"""

from __future__ import annotations

import re

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample, references

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Choice:
    def __init__(self, config: settings.Choice) -> None:
        self._config = config
        self._letters = _LETTERS[: config.num_choices]
        one = rf"([{self._letters}{self._letters.lower()}])"
        wrapped = rf"[\s*_$(\[{{\"']*{one}(?![\w'])"
        self._stated = re.compile(
            rf"\\boxed\s*{{\s*(?:\\(?:text|mathrm|textbf)\s*{{)?\s*[(\[]?{one}(?![A-Za-z])"
            rf"|(?i:\b(?:answer|choice|option)\b[*_]*\s*(?:is|:|=)\s*(?:option\b|choice\b)?[:*_\s]*){wrapped}"
        )
        self._alone = re.compile(rf"[\s*_(\[]*{one}[\s*_)\].:]*")
        self._begins = re.compile(rf"\s*(?:\*\*)?(?:\({one}\)|{one}[.):](?=\s|\*|$))")
        self._bracketed = re.compile(rf"\({one}\)")

    def score(self, sample: Sample) -> float:
        wanted = [self._reference(text) for text in references(self._config, sample)]
        return float(self.chosen(sample.text) in wanted)

    def chosen(self, text: str) -> str | None:
        """The letter, in upper case; None where there is none."""
        if stated := list(self._stated.finditer(text)):
            return _letter(stated[-1])
        if match := self._alone.fullmatch(text) or self._begins.match(text):
            return _letter(match)
        bracketed = list(self._bracketed.finditer(text))
        return _letter(bracketed[-1]) if bracketed else None

    def _reference(self, text: str) -> str:
        letter = self.chosen(text)
        if letter is None:
            raise RewardError(
                f"the reference {text!r:.80} is none of the letters {self._letters[0]} to {self._letters[-1]}"
            )
        return letter


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()

"""Rewards that compare texts: the same, contained, words shared, a pattern."""

from __future__ import annotations

import re
import string
from collections import Counter

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.rewards.base import Sample, references

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch:
    def __init__(self, config: settings.ExactMatch) -> None:
        self._config = config

    def score(self, sample: Sample) -> float:
        return float(self._form(sample.text) in map(self._form, references(self._config, sample)))

    def _form(self, text: str) -> str:
        return text.strip().casefold() if self._config.ignore_case else text.strip()


class Contains:
    """An empty reference is contained in nothing: else any response would have the reward."""

    def __init__(self, config: settings.Contains) -> None:
        self._config = config

    def score(self, sample: Sample) -> float:
        found = [self._within(reference.strip(), sample.text) for reference in references(self._config, sample)]
        return float(any(found) if self._config.need == "any" else all(found))

    def _within(self, reference: str, text: str) -> bool:
        if not reference:
            return False
        pattern = re.escape(reference)
        if self._config.whole_words:
            pattern = rf"(?<!\w){pattern}(?!\w)" if reference[-1].isalnum() else rf"(?<!\w){pattern}"
        return re.search(pattern, text, re.IGNORECASE if self._config.ignore_case else 0) is not None


class TokenF1:
    def __init__(self, config: settings.TokenF1) -> None:
        self._config = config

    def score(self, sample: Sample) -> float:
        return max(f1(sample.text, reference) for reference in references(self._config, sample))


def f1(text: str, reference: str) -> float:
    """2 PR / (P + R) over words with their counts; two texts without words are equal, one is worth nothing."""
    ours, theirs = (Counter(_words(one)) for one in (text, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


class Regex:
    """A pattern that backtracks without end is ended by the worker's owner at the deadline."""

    def __init__(self, config: settings.Regex) -> None:
        self._config = config
        self._pattern = re.compile(config.pattern)

    def score(self, sample: Sample) -> float:
        if self._config.whole:
            match = self._pattern.fullmatch(sample.text.strip())
        elif self._config.equals_reference:
            match = None
            for match in self._pattern.finditer(sample.text):  # noqa: B007 # the last one
                pass
        else:
            match = self._pattern.search(sample.text)
        if match is None or not self._config.equals_reference:
            return float(match is not None)
        return float((match[1] or "").strip() in [text.strip() for text in references(self._config, sample)])

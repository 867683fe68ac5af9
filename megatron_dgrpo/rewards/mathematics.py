"""Mathematical equality by math-verify, which parses LaTeX and plain expressions and compares them with SymPy.

Its own limits of time give "not equal" when they pass; they are off here, and the worker's limit is a failure of the
reward. A response that holds no formula, or one that SymPy cannot compare, is wrong, as math-verify has it; a reference
without a formula is a fault of the data and fails.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample, references


class Math:
    def __init__(self, config: settings.Math) -> None:
        try:
            import math_verify
        except ModuleNotFoundError as error:
            raise RewardError(
                f"the reward math needs the package math-verify ({error}): install the extra `rewards`"
            ) from None
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self._config, self._library = config, math_verify
        self._references: dict[str, Any] = {}

    def score(self, sample: Sample) -> float:
        given = self._parse(sample.text)
        if not given:
            return 0.0
        return float(any(self._equal(self._gold(text), given) for text in references(self._config, sample)))

    def _gold(self, text: str) -> Any:
        """Parsed once for a group. A bare "1/2" or "x^2" is read as a formula, too."""
        if text not in self._references:
            parsed = self._parse(text) or self._parse(f"${text}$")
            if not parsed:
                raise RewardError(f"the reference {text!r:.80} holds no formula that math-verify can read")
            self._references = {text: parsed}
        return self._references[text]

    def _parse(self, text: str) -> Any:
        return self._library.parse(text, parsing_timeout=None)

    def _equal(self, gold: Any, given: Any) -> bool:
        return self._library.verify(gold, given, float_rounding=self._config.digits, timeout_seconds=None)

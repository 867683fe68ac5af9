"""What became of rows that cannot be used: counted by reason, the first of them listed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from megatron_dgrpo.errors import DataError, listing

MAX_LISTED = 20
"""Bad rows that an error lists; the others are counted."""

_VARYING = re.compile(r" \((it has|column|byte|nested).*?\)|; it is the last line.*| (of|in) message \d+")
"""Parts of a problem that differ from row to row."""


class BadRows:
    """Of one source; `unit` is what a row is called there."""

    def __init__(self, where: str, unit: str = "row") -> None:
        self.where = where
        self.num_good = 0
        self._unit = unit
        self._listed: list[str] = []
        self._reasons: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self._reasons.total()

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows of each kind of problem; a row with several counts under its first."""
        return dict(self._reasons.most_common())

    def add(self, number: int, problems: Sequence[str]) -> None:
        """A row, its number counting from 1, and what is wrong with it."""
        self._reasons[_reason(problems[0])] += 1
        if len(self._listed) < MAX_LISTED:
            self._listed.append(f"{self._unit} {number} {', '.join(problems)}")

    def add_many(self, numbers: Sequence[int], problem: str) -> None:
        """Rows with one and the same problem."""
        for number in numbers[:MAX_LISTED]:
            self.add(number, [problem])
        if len(numbers) > MAX_LISTED:
            self._reasons[_reason(problem)] += len(numbers) - MAX_LISTED

    def refuse(self, wanted: str) -> None:
        """Raise if there is any; `wanted` completes the sentence "a row is ..."."""
        if self.count:
            total = self.num_good + self.count
            more = [f"and {self.count - MAX_LISTED} more"] if self.count > MAX_LISTED else []
            title = f"{self.count} of {total} rows of {self.where} can't be used; a {self._unit} is {wanted}:"
            raise DataError(listing(title, self._listed + more) + "\nCorrect them, or set on_bad_row: skip")

    def summary(self) -> str:
        """One line for those that were skipped."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{self.where}: {self.count} of {self.num_good + self.count} rows were skipped ({reasons})"


def _reason(problem: str) -> str:
    """A problem without what differs from row to row."""
    return _VARYING.sub("", problem)

"""Rows that name a teacher that there is not, and teachers that no row names, are found before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_dgrpo.data.bad_rows import MAX_LISTED
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.errors import DataError, listing


def check_teachers(rows: Iterable[PromptRow], names: Sequence[str], *, where: str) -> set[str]:
    """Each row names one of the teachers. Returns those that are named; `where` is the setting of their field."""
    found: set[str] = set()
    num_bad, problems = 0, []
    for row in rows:
        assert row.teacher is not None
        found.add(row.teacher)
        if row.teacher not in names:
            num_bad += 1
            if num_bad <= MAX_LISTED:
                problems.append(f"{row.name}: {row.teacher!r}")
    if num_bad:
        more = [f"and {num_bad - MAX_LISTED} more"] if num_bad > MAX_LISTED else []
        known = ", ".join(map(repr, names))
        title = f"{num_bad} rows name a teacher that is not listed (there is {known}); correct them or {where}:"
        raise DataError(listing(title, problems + more))
    return found

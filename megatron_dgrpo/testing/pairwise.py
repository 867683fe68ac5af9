"""Few combinations of many settings in which every pair of values meets.

Faults of composition mostly lie between two settings. Of all combinations that are allowed, a few hold every pair of
values that any of them holds. They are chosen greedily, and always alike: the next one has the most pairs that are
not yet covered, and is the cheapest of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
Pair = tuple[str, Any, str, Any]


def pairs(case: Mapping[str, Any]) -> set[Pair]:
    return {(a, case[a], b, case[b]) for a, b in combinations(sorted(case), 2)}


def pairwise(
    values: Mapping[str, Sequence[Any]],
    *,
    allowed: Callable[[Case], bool],
    cost: Callable[[Case], float],
    already: Iterable[Case] = (),
) -> list[Case]:
    """Combinations that together with those of `already` hold every pair of values that is possible."""
    candidates = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    candidates = sorted((case for case in candidates if allowed(case)), key=cost)
    held = [pairs(case) for case in candidates]
    left = set().union(*held).difference(*map(pairs, already))
    chosen = []
    while left:
        best = max(range(len(candidates)), key=lambda i: len(held[i] & left))  # the first of equals, so the cheapest
        chosen.append(candidates[best])
        left -= held[best]
    return chosen

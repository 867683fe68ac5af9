"""What is found out about rewards before a run: whether they can be made, and whether the rows have what they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_dgrpo.config.rewards import AnyReward
from megatron_dgrpo.rewards.pool import RewardPool


def reward_problems(
    rewards: Sequence[AnyReward], where: str, rows: Iterable[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """Sentences; `rows` are names and fields, of which every one is looked at."""
    with RewardPool(1) as pool:
        found = [f"{where}.rewards: {problem}" for problem in pool.problems(rewards)]
    wanted = {name: reward.label for reward in rewards for name in reward.row_fields or ()}
    missing: dict[str, list[str]] = {}
    for row, fields in rows if wanted else ():
        for name in wanted:
            if name not in fields:
                missing.setdefault(name, []).append(row)
    return found + [
        f"{where}.rewards: {wanted[name]} reads the field {name!r}, which {len(names)} rows lack "
        f"({names[0]} the first): add it to the data, or name another field"
        for name, names in missing.items()
    ]

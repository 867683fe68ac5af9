"""The page on rewards: its examples load, and every kind and setting is on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import yaml
from pydantic import TypeAdapter

from megatron_dgrpo.config.constraints import Constraint
from megatron_dgrpo.config.reward_rules import reward_problems
from megatron_dgrpo.config.rewards import AnyReward, Reward

PAGE = (Path(__file__).parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
EXAMPLES = [entry for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S) for entry in yaml.safe_load(block)]


def test_the_examples_load_and_agree_with_themselves() -> None:
    adapter: TypeAdapter[AnyReward] = TypeAdapter(Reward)
    rewards = [adapter.validate_python(_numbers(entry)) for entry in EXAMPLES]
    assert {reward.kind for reward in rewards} == {
        get_args(kind.model_fields["kind"].annotation)[0] for kind in _kinds()
    }
    assert [problem for reward in rewards for problem in reward_problems(reward)] == []


def _numbers(entry: dict[str, object]) -> dict[str, object]:
    """PyYAML alone reads 1e-6 as text; the config's loader does not."""
    return {key: float(value) if value == "1e-6" else value for key, value in entry.items()}


def _kinds() -> tuple[type, ...]:
    return get_args(AnyReward)


def test_every_setting_is_on_the_page() -> None:
    fields = {name for kind in _kinds() for name in kind.model_fields}
    assert [name for name in sorted(fields) if not re.search(rf"(?<!\w){name}(?!\w)", PAGE)] == []
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(Constraint)}
    used = {constraint["kind"] for entry in EXAMPLES for constraint in entry.get("constraints", ())}
    assert used == kinds


def test_every_setting_is_described() -> None:
    bare = [
        f"{kind.__name__}.{name}"
        for kind in (*_kinds(), *get_args(Constraint))
        for name, field in kind.model_fields.items()
        if not field.description and name != "kind"
    ]
    assert bare == []

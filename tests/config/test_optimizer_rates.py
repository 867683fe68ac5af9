"""The learning rate of each update against the formulas, and what a config of the optimizer may not say."""

from __future__ import annotations

import math

import pytest

from megatron_dgrpo.config.optimizer import Adam, problems, rate


def rates(num_updates: int, **settings: object) -> list[float]:
    adam = Adam.model_validate({"lr": 2.0} | settings)
    return [rate(adam, update, num_updates) for update in range(1, num_updates + 1)]


def test_warm_up_then_constant() -> None:
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(2) == [2.0, 2.0]


def test_down_a_line_to_a_floor_that_lies_one_update_after_the_last() -> None:
    assert rates(6, warmup_steps=2, schedule="linear") == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    with_floor = {"kind": "linear", "floor": 0.5}
    assert rates(4, schedule=with_floor) == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_down_half_a_cosine() -> None:
    expected = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 5)) / 2) for k in range(5)]
    assert rates(7, warmup_steps=2, schedule={"kind": "cosine", "floor": 0.1})[2:] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("sqrt", lambda p: 1 - p**0.5),
    ],
)
def test_warm_up_stable_decay(shape: str, formula: object) -> None:
    found = rates(10, warmup_steps=2, schedule={"kind": "wsd", "decay_steps": 4, "shape": shape})
    assert found[:6] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert found[6:] == pytest.approx([2.0 * formula(k / 4) for k in range(4)])  # type: ignore[operator]


def test_what_is_past_the_stages_updates_stays_at_the_floor() -> None:
    adam = Adam(lr=1.0, schedule={"kind": "cosine", "floor": 0.25})  # type: ignore[arg-type]
    assert rate(adam, 99, 10) == 0.25


def test_warm_up_and_decay_must_fit() -> None:
    adam = Adam.model_validate({"lr": 1.0, "warmup_steps": 8, "schedule": {"kind": "wsd", "decay_steps": 4}})
    (found,) = problems(adam, 10)
    assert found.startswith("schedule: 8 updates of warm-up and 4 of decay are more than the stage's 10; shorten them")
    assert list(problems(adam, 12)) == list(problems(adam, None)) == []
    (found,) = problems(Adam(lr=1.0, betas=(0.9, 1.5)), 10)
    assert found.startswith("betas.1: 1.5 is not in [0, 1)")

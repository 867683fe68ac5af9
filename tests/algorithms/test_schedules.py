import math
import subprocess
import sys

import pytest

from megatron_dgrpo.algorithms.schedules import AdaptiveKL, Constant, Cosine, Linear
from megatron_dgrpo.errors import ConfigError, ObjectiveError


def test_functions_of_the_step():
    assert [Constant(0.5).value(s) for s in (0, 10**6)] == [0.5, 0.5]
    linear = Linear(start=1.0, end=0.2, steps=4)
    assert [linear.value(s) for s in (0, 1, 4, 9)] == pytest.approx([1.0, 0.8, 0.2, 0.2])
    cosine = Cosine(start=1.0, end=0.0, steps=4)
    assert [cosine.value(s) for s in (0, 1, 2, 4, 9)] == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.0, 0.0], abs=1e-15
    )
    assert Linear(start=1.0, end=0.2, steps=0).value(0) == 0.2


def test_adaptive_steers_a_divergence_to_its_target():
    """A stand-in for training: the divergence is 0.3 / factor."""
    schedule = AdaptiveKL(initial=0.5, target=0.1)
    for step in range(300):
        schedule.observe(0.3 / schedule.value(step))
    assert schedule.value(300) == pytest.approx(3.0, rel=0.01)


def test_adaptive_moves_by_a_bounded_amount_within_its_bounds():
    schedule = AdaptiveKL(initial=1.0, target=0.1, rate=0.5, max_error=0.2, low=0.5, high=1.15)
    schedule.observe(1e9)
    assert schedule.value(1) == pytest.approx(1.1)
    schedule.observe(1e9)
    assert schedule.value(2) == 1.15
    for _ in range(20):
        schedule.observe(0.0)
    assert schedule.value(22) == 0.5
    schedule.observe(0.1)
    assert schedule.value(23) == 0.5
    with pytest.raises(ObjectiveError, match="nan"):
        schedule.observe(math.nan)


def test_state_resumes_where_it_was():
    schedule = AdaptiveKL(initial=1.0, target=0.1)
    schedule.observe(0.5)
    resumed = AdaptiveKL(initial=1.0, target=0.1)
    resumed.load(schedule.state())
    assert resumed.value(1) == schedule.value(1) != 1.0
    for stateless in (Constant(1.0), Linear(1.0, 0.0, 3), Cosine(1.0, 0.0, 3)):
        stateless.observe(1.0)
        stateless.load(stateless.state())
        with pytest.raises(ConfigError, match="saved with another schedule"):
            stateless.load(schedule.state())
    for bad in ({}, {"level": math.nan}, {"level": 1e9}):
        with pytest.raises(ConfigError, match="resumes from a level"):
            resumed.load(bad)


def test_all_impossible_settings_are_listed():
    with pytest.raises(ConfigError) as raised:
        AdaptiveKL(initial=1e9, target=0.0, rate=20.0)
    assert all(word in str(raised.value) for word in ("target", "initial", "rate"))


def test_what_plans_a_run_needs_no_torch():
    modules = ("schedules", "advantages", "aggregation", "routing")
    code = "; ".join(f"import megatron_dgrpo.algorithms.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True)

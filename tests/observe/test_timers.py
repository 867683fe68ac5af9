from __future__ import annotations

import pytest

from megatron_dgrpo.observe.timers import Phases


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_over_repeats_and_nesting() -> None:
    clock = Clock()
    phases = Phases(clock)
    clock.now += 1  # belongs to no phase
    for _ in range(2):
        with phases("generate"):
            clock.now += 2
            with phases("sync"):
                clock.now += 4
            clock.now += 8
    with phases("train"):
        pass
    assert phases.seconds == {"generate": 20.0, "sync": 8.0, "train": 0.0}
    assert phases.elapsed == 29.0


def test_a_phase_that_raises_still_counts() -> None:
    clock = Clock()
    phases = Phases(clock)
    with pytest.raises(KeyError), phases("score"):
        clock.now += 3
        raise KeyError
    clock.now += 5
    with phases("train"):
        clock.now += 7
    assert phases.seconds == {"score": 3.0, "train": 7.0}


def test_a_phase_that_still_runs_counts_so_far() -> None:
    """The last report of a step is made inside its phase."""
    clock = Clock()
    phases = Phases(clock)
    with phases("train"):
        clock.now += 3
        assert phases.seconds == {"train": 3.0}
        clock.now += 4
    assert phases.seconds == {"train": 7.0}

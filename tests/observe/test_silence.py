from __future__ import annotations

from megatron_dgrpo.observe.silence import SilentSteps

EQUAL = {"groups": 8.0, "equal_groups": 8.0, "reward/mean": 0.0}
ALONE = {"surrogate": 1.0}
TAUGHT = {"surrogate": 1.0, "teacher_kl": 0.5}


def test_only_equal_groups_for_several_steps_are_told_of_ever_more_rarely() -> None:
    silent = SilentSteps()
    told = [step for step in range(1, 30) if silent.observe(EQUAL, ALONE)]
    assert told == [3, 6, 12, 24]


def test_one_group_that_differs_or_another_term_is_enough() -> None:
    silent = SilentSteps()
    for _ in range(9):
        assert silent.observe(EQUAL, TAUGHT) is None
    assert [silent.observe(EQUAL, ALONE) for _ in range(2)] == [None, None]
    assert silent.observe(EQUAL | {"equal_groups": 7.0}, ALONE) is None
    assert [silent.observe(EQUAL, ALONE) for _ in range(2)] == [None, None], "it counts anew"
    assert silent.observe(EQUAL, {"surrogate": 1.0, "teacher_kl": 0.0}) is not None, "a schedule at 0 has no say"


def test_equal_rewards_beside_a_teacher_are_told_of_after_more_steps() -> None:
    silent = SilentSteps()
    told = {step: words for step in range(1, 50) if (words := silent.observe(EQUAL, TAUGHT))}
    assert list(told) == [10, 20, 40] and "only the other terms" in told[10]
    assert silent.observe(EQUAL | {"equal_groups": 7.0}, TAUGHT) is None
    assert [bool(silent.observe(EQUAL, TAUGHT)) for _ in range(10)] == [False] * 9 + [True], "it counts anew"
    unrewarded = SilentSteps(rewarded=False)
    assert not any(unrewarded.observe(EQUAL, TAUGHT) for _ in range(100)), "a teacher alone was asked for"

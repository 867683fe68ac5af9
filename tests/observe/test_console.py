from __future__ import annotations

import io
import math

from megatron_dgrpo.observe.console import Console

VALUES = {
    "stage": "dgrpo", "loss": 0.12345, "reward/mean": 0.5, "teacher_kl/kl": 0.25, "mismatch/abs": 2.5e-6,
    "surrogate/clipped_low": 0.01, "surrogate/clipped_high": 0.02, "grad_norm": 1.5, "tokens_per_s": 12345.6,
    "time/generate": 1.25, "time/score": 0.001, "time/step": 2.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plain_line_per_step() -> None:
    stream = io.StringIO()
    Console(stream).step("dgrpo", 3, 30, VALUES)
    assert stream.getvalue() == (
        "dgrpo  3/30  loss  0.1235  reward 0.500  KL 0.2500  mismatch 2.5e-06  clipped  3.0%  grad     1.5"
        "  tokens/s  12,346  (generate 1.2s)\n"
    )


def test_equal_groups_are_shown_where_there_are_any() -> None:
    stream = io.StringIO()
    for equal in (0.0, 3.0):
        Console(stream).step("dgrpo", 1, 2, {"reward/mean": 1.0, "groups": 8.0, "equal_groups": equal})
    assert stream.getvalue() == "dgrpo 1/2  reward 1.000\ndgrpo 1/2  reward 1.000  equal groups 3/8\n"


def test_what_a_step_does_not_have_is_left_out() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.step("sft", 120, 120, {"heldout/reward": 0.25, "loss": None})
    console.step("sft", 1, 120, {"loss": math.nan})
    console.note("[exported] to x")
    assert stream.getvalue() == "sft 120/120  held-out reward 0.250\nsft   1/120  loss     nan\n[exported] to x\n"


def test_a_terminal_gets_colours_and_the_same_words() -> None:
    stream, plain = Terminal(), io.StringIO()
    console = Console(stream)
    console.step("dgrpo", 3, 30, VALUES | {"loss": math.inf})
    Console(plain).step("dgrpo", 3, 30, VALUES | {"loss": math.inf})
    written = stream.getvalue()
    import re

    assert re.sub(r"\x1b\[[0-9;]*m", "", written) == plain.getvalue()


def test_columns_stand_under_one_another_and_the_rest_of_a_stage_is_foretold() -> None:
    stream = io.StringIO()
    console = Console(stream)
    for step, (loss, rate) in enumerate([(12.5, 999.0), (0.03, 1234567.0), (0.02, 5.0)], 1):
        record = {"stage_number": 0, "step": step, "time": 100.0 + 30 * step}
        console.step("sft", step, 100, record | {"loss": loss, "grad_norm": 1e-5 * step, "tokens_per_s": rate})
    first, second, third = stream.getvalue().splitlines()
    assert first == "sft   1/100  loss 12.5000  grad   1e-05  tokens/s     999"
    assert second == "sft   2/100  loss  0.0300  grad   2e-05  tokens/s 1,234,567  49:00 left"
    assert third == "sft   3/100  loss  0.0200  grad   3e-05  tokens/s       5  48:30 left"

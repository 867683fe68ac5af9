from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest

from megatron_dgrpo.observe import progress
from megatron_dgrpo.observe.follow import Follower
from megatron_dgrpo.observe.pace import Pace, in_words
from megatron_dgrpo.observe.progress import Board, read_board
from megatron_dgrpo.observe.screen import Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_board_says_what_is_long_and_what_it_stands_in(tmp_path: Path) -> None:
    board = Board(tmp_path / "board-rank0.json")
    assert read_board(tmp_path / "board-rank0.json") is None
    board.step("dgrpo", 1, 3, 30)
    with board.task("sync"):
        with board.task("load", 100, "bytes") as task:
            task.advance(40)
            time.sleep(0.21)
            task.advance(10)
            state = read_board(tmp_path / "board-rank0.json")
            assert state is not None
            assert (state.what, state.done, state.total, state.unit) == ("load", 50, 100, "bytes")
            board.step("dgrpo", 1, 4, 30)
        state = read_board(tmp_path / "board-rank0.json")
        assert state is not None and (state.what, state.total, state.step) == ("sync", 0, 4)
    state = read_board(tmp_path / "board-rank0.json")
    assert state is not None and state.what == "" and state.step == 4
    whole = (tmp_path / "board-rank0.json").read_bytes()
    (tmp_path / "board-rank0.json").write_bytes(whole.replace(b'"step": 4', b'"step": 5'))
    assert read_board(tmp_path / "board-rank0.json") is None, "half of another state"


def test_without_a_supervisor_or_its_folder_a_board_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    assert list(Board().over(range(3), "x", 3)) == [0, 1, 2]
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "gone" / "board.json"))
    assert list(Board().over(range(3), "x", 3)) == [0, 1, 2]


def test_a_board_costs_little_however_often_it_is_told(tmp_path: Path) -> None:
    board, writes = Board(tmp_path / "b"), 0
    with board.task("rows", 10_000) as task:
        last = 0
        for _ in range(10_000):
            task.advance()
            now = (tmp_path / "b").stat().st_mtime_ns
            writes, last = writes + (now != last), now
    assert writes < 50


def test_lines_come_whole_and_a_file_may_come_late(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = Follower(path)
    assert follower.lines() == []
    path.write_bytes(b"one\ntw")
    assert follower.lines() == ["one"]
    with path.open("ab") as file:
        file.write(b"o\nthree")
    assert follower.lines() == ["two"] and follower.lines() == []
    assert follower.lines(last=True) == ["three"]
    assert Follower(path).lines() == [], "what was there before is not told again"


def test_elsewhere_there_are_plain_lines_and_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, stream = tmp_path / "rank0.log", io.StringIO()
    board = Board(tmp_path / "board-rank0.json")
    screen = Screen(
        tmp_path,
        log,
        lambda: [tmp_path / "board-rank0.json"],
        hidden=lambda line: line.startswith("[Gloo]"),
        stream=stream,
    )
    log.write_text("sft 1/9  loss 1.0\n[Gloo] Rank 0\nwarning: x\n")
    screen.tick()
    board.step("dgrpo", 0, 2, 9)
    with board.task("generate", 400, "samples") as task:
        task.advance(100)
        screen.tick()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 30.0)
        board.step("dgrpo", 0, 2, 9)  # writes the state
        screen.tick()
        screen.tick()
        monkeypatch.setattr(time, "monotonic", lambda: now + 41.0)
        screen.tick()
    screen.close()
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["sft 1/9  loss 1.0", "warning: x"]
    assert lines[2:] == [
        "dgrpo 2/9  generate: 100/400 samples, 25%, 1:30 left",
        "dgrpo 2/9  generate: 100/400 samples, 25%, 2:03 left",
    ]


def test_a_terminal_has_a_footer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    log, stream = tmp_path / "rank0.log", Terminal()
    board = Board(tmp_path / "board-rank0.json")
    screen = Screen(tmp_path, log, lambda: [tmp_path / "board-rank0.json"], stream=stream)
    board.step("dgrpo", 1, 5, 30)
    records = [
        {"time": 100.0 + 10 * step, "stage": "dgrpo", "stage_number": 1, "step": step, "reward/mean": 0.5 + step / 10,
         "time/generate": 6.0, "time/train": 2.0, "time/step": 8.0} for step in (3, 4)
    ]  # fmt: skip
    records.append({"time": 145.0, "stage": "dgrpo", "stage_number": 1, "step": 4, "heldout/reward": 0.75,
                    "time/generate": 99.0, "time/step": 99.0})  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"torn')
    log.write_text("warning: look\n")
    with board.task("generate", 64, "samples") as task:
        task.advance(16)
        time.sleep(0.21)
        task.advance(16)
        screen.tick()
    screen.close()
    text = plain(stream.getvalue())
    assert "warning: look" in text and "\x1b[33mwarning: look" in stream.getvalue()
    assert "stage 2: dgrpo 5/30" in text and "4:20 left" in text
    assert "held-out reward 0.750" in text and "reward 0.900" in text
    assert "8.0 s a step: generate 75%   train 25%" in text
    assert "32/64 samples, 50%" in text
    assert stream.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in stream.getvalue(), "the cursor is back"


def test_a_terminal_that_has_gone_ends_nothing(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("gone")

    log = tmp_path / "rank0.log"
    screen = Screen(tmp_path, log, list, stream=Gone())
    log.write_text("a\nb\n")
    screen.tick()
    screen.close()


def test_the_pace_of_the_last_steps_foretells_the_rest() -> None:
    pace = Pace()
    assert pace.left_s(100) is None
    for step in range(1, 41):
        pace.observe({"stage_number": 0, "step": step, "time": 10.0 * min(step, 20) + 2.0 * max(0, step - 20)})
    assert pace.left_s(100) == pytest.approx(60 * 2.0, rel=0.1), "it follows a change"
    pace.observe({"stage_number": 1, "step": 1, "time": 500.0})
    assert pace.left_s(100) is None, "another stage has another pace"
    assert [in_words(s) for s in (5.4, 65, 3725)] == ["5 s", "1:05", "1:02:05"]

"""Data that fail for a while, hang, or end early: tried again, or an error within the deadline, and no row lost."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_dgrpo.config.data import Dataset, Source
from megatron_dgrpo.data import jsonl, patience, stream
from megatron_dgrpo.data.dataset import PromptSource
from megatron_dgrpo.errors import DataError


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """Not waited for, but kept."""
    found: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", found.append)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def _file(tmp_path: Path, count: int = 20) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": "a"}) + "\n" for i in range(count)))
    return path


class Flaky:
    """`open`, which fails so often before it works."""

    def __init__(self, number: int) -> None:
        self.number, self.failures = number, 0

    def __call__(self, *arguments: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number))
        return open(*arguments)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET], ids=os.strerror)
def test_a_file_that_fails_for_a_while_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], number: int
) -> None:
    expected = PromptSource(Dataset(path=str(_file(tmp_path))), seed=1).take(30)
    flaky = Flaky(number)
    monkeypatch.setattr(jsonl, "open", flaky, raising=False)
    flaky.failures = 2  # while it is first read
    rows = PromptSource(Dataset(path=str(tmp_path / "rows.jsonl")), seed=1)
    found = rows.take(10)
    flaky.failures = 5
    found += rows.take(20)
    assert found == expected
    assert pauses == [1.0, 2.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert rows.facts()["data/retries"] == 7


def test_a_file_that_goes_on_failing_ends_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = PromptSource(Dataset(path=str(_file(tmp_path)), retries=2), seed=1)
    flaky = Flaky(errno.EIO)
    monkeypatch.setattr(jsonl, "open", flaky, raising=False)
    flaky.failures = 3
    with pytest.raises(DataError, match=r"rows.jsonl can't be read \(Input/output error\), tried 3 times: see to the"):
        rows.take(1)
    assert pauses == [1.0, 2.0]
    assert "can't be read (Input/output error); it is tried again in 2 s" in capsys.readouterr().out


def test_what_stays_wrong_is_not_tried_again(tmp_path: Path, pauses: list[float]) -> None:
    rows = PromptSource(Dataset(path=str(_file(tmp_path))), seed=1)
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"can't be read \(No such file or directory\): correct the data's path"):
        rows.take(1)
    (tmp_path / "rows.jsonl").write_text("another file\n")
    with pytest.raises(DataError, match="has changed since it was first read"):
        rows.take(1)
    assert pauses == []


def test_a_read_that_hangs_ends_the_run_within_its_deadline(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to never returns."""
    rows = PromptSource(Dataset(path=str(_file(tmp_path)), timeout_s=0.5), seed=1)
    rows.take(1)
    (tmp_path / "rows.jsonl").unlink()
    os.mkfifo(tmp_path / "rows.jsonl")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"a read of .*rows.jsonl has hung for 0.5 s: see to the file system"):
        rows.take(1)
    assert time.monotonic() - start < 60
    os.close(os.open(tmp_path / "rows.jsonl", os.O_RDWR | os.O_NONBLOCK))  # the thread need not outlive the test


# ---- streams ----


class Feed:
    """What a stream's generator does when it comes to a row: `at` says it, once each time it is set."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.at: dict[int, list[Callable[[], None]]] = {}
        self.opened = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            if self.at.get(number):
                try:
                    self.at[number].pop(0)()
                except StopIteration:
                    return
            yield {"prompt": f"p{number}", "answer": "a"}

    def open(self, source: Source, *, streaming: bool) -> Any:
        self.opened += 1
        return datasets.IterableDataset.from_generator(self.rows)


def _fail() -> None:
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def _end() -> None:
    raise StopIteration


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    feed = Feed(25)
    monkeypatch.setattr(stream, "open_dataset", feed.open)
    return feed


def _stream(**changes: Any) -> PromptSource:
    return PromptSource(Dataset(path="rows.jsonl", streaming=True, shuffle_buffer=8, **changes), seed=1)


def test_a_stream_that_breaks_in_a_block_is_read_again_from_its_beginning(feed: Feed, pauses: list[float]) -> None:
    expected = _stream().take(70)
    rows = _stream()
    feed.at[11] = [_fail, _fail]  # in the middle of the second block of this epoch
    assert rows.take(40) == expected[:40]
    state = json.loads(json.dumps(rows.state()))
    feed.at[0] = [_fail]  # at the beginning of an epoch
    assert rows.take(30) == expected[40:]
    assert pauses == [1.0, 2.0, 1.0] and rows.facts()["data/retries"] == 3
    again = _stream()
    again.restore(state)
    assert again.take(30) == expected[40:], "a run that goes on there takes the same rows"


def test_a_stream_that_ends_before_it_did_in_the_last_epoch_has_failed(feed: Feed, pauses: list[float]) -> None:
    """It is read again; where it stays short, the run ends."""
    expected = _stream().take(75)
    rows = _stream(retries=1)
    rows.take(25)
    feed.at[13] = [_end]
    assert rows.take(25) == expected[25:50]
    assert pauses == [1.0]
    feed.at[13] = [_end, _end]
    with pytest.raises(DataError, match=r"it ended after 13 rows, and had 25 in the epoch before\), tried 2 times"):
        rows.take(25)


def test_a_stream_that_hangs_ends_the_run_within_its_deadline(feed: Feed) -> None:
    import threading

    goes_on = threading.Event()
    rows = _stream(timeout_s=0.5)
    feed.at[9] = [lambda: goes_on.wait(60) and None]
    rows.take(8)
    with pytest.raises(DataError, match="a read of rows.jsonl has hung for 0.5 s"):
        rows.take(1)
    goes_on.set()

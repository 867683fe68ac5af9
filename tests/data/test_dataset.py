from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_dgrpo.config.schema import Dataset
from megatron_dgrpo.data.dataset import PromptSource, read_rows


def dataset(folder: Path, count: int) -> Dataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"q{i}", "a": f"a{i}", "kind": i % 3}) + "\n" for i in range(count)))
    return Dataset(path=str(path), prompt="q", answer="a")


def test_rows_have_names_texts_and_everything_else(tmp_path: Path) -> None:
    rows = read_rows(dataset(tmp_path, 5))
    assert len(rows) == 5
    assert (rows[3].name, rows[3].prompt, rows[3].answer, rows[3].fields["kind"]) == ("rows.jsonl:4", "q3", "a3", 0)
    assert rows[-1] == rows[4]
    assert [row.answer for row in rows[1:9]] == ["a1", "a2", "a3", "a4"]
    with pytest.raises(IndexError):
        rows[5]


def test_an_epoch_has_every_row_once_and_the_next_another_order(tmp_path: Path) -> None:
    source = PromptSource(dataset(tmp_path, 40), seed=3)
    first, second = ([r.prompt for step in steps for r in source.take(step, 8)] for steps in (range(5), range(5, 10)))
    assert sorted(first) == sorted(second) == sorted(f"q{i}" for i in range(40))
    assert first != second and first != [f"q{i}" for i in range(40)]


def test_a_batch_is_a_function_of_the_step_alone(tmp_path: Path) -> None:
    data = dataset(tmp_path, 11)
    source = PromptSource(data, seed=0)
    forward = [source.take(step, 4) for step in range(12)]
    for step in (11, 2, 7, 0):  # resuming anywhere, and going back
        assert PromptSource(data, seed=0).take(step, 4) == forward[step]
        assert source.take(step, 4) == forward[step]
    flat = [row.name for batch in forward for row in batch]
    assert flat == [row.name for step in range(6) for row in source.take(step, 8)]


def test_seeds_differ(tmp_path: Path) -> None:
    data = dataset(tmp_path, 30)
    orders = {tuple(PromptSource(data, seed=seed).order(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_this_one_for_good(tmp_path: Path) -> None:
    assert PromptSource(dataset(tmp_path, 8), seed=1).order(2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]


def test_names_are_unique_in_a_batch_larger_than_the_data(tmp_path: Path) -> None:
    batch = PromptSource(dataset(tmp_path, 3), seed=0).take(1, 8)
    assert len({row.name for row in batch}) == 8
    assert max(Counter(row.prompt for row in batch).values()) == 3
    assert batch[0].name.split("@")[1] == "2" and batch[-1].name.split("@")[1] == "5"

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_dgrpo.config.data import Source
from megatron_dgrpo.data.dataset import PromptSource, Rows
from megatron_dgrpo.data.rows import Chat
from megatron_dgrpo.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "p0", "answer": "a0", "n": 0},
    {"prompt": None, "answer": "a1", "n": 1},
    {"prompt": "p2", "answer": "", "n": 2},
    {"prompt": "é\u2028", "answer": "a3", "n": 3},
    {"prompt": None, "answer": None, "n": 4},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_parquet_rows_are_read_and_bad_ones_counted_by_reason(tmp_path: Path) -> None:
    source = Source(path=str(parquet(tmp_path / "rows.parquet", ROWS)), on_bad_row="skip")
    rows = Rows(source)
    assert [(row.name, row.prompt, row.answer, row.fields["n"]) for row in rows] == [
        ("rows.parquet:1", "p0", "a0", 0), ("rows.parquet:4", "é\u2028", "a3", 3),
    ]  # fmt: skip
    assert rows.bad.reasons == {
        "has nothing (null) in the field 'prompt'": 2, "has nothing in the field 'answer'": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"3 of 5 rows(.|\n)*row 2 has nothing \(null\) in the field 'prompt'"):
        Rows(source.model_copy(update={"on_bad_row": "error"}))


def test_many_bad_rows_are_all_counted(tmp_path: Path) -> None:
    rows = [{"prompt": None, "answer": "a"}] * 70 + [{"prompt": "p", "answer": "a"}]
    found = Rows(Source(path=str(parquet(tmp_path / "rows.parquet", rows)), on_bad_row="skip"))
    assert (len(found), found.bad.count, found[0].name) == (1, 70, "rows.parquet:71")


def test_folders_of_files_and_saved_datasets(tmp_path: Path) -> None:
    for number in range(3):
        parquet(tmp_path / "files" / f"part-{number}.parquet", [{"prompt": f"p{number}", "answer": "a"}] * 2)
    assert [row.prompt for row in Rows(Source(path=str(tmp_path / "files")))] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    (tmp_path / "lines").mkdir()
    for number in range(2):
        (tmp_path / "lines" / f"{number}.jsonl").write_text(json.dumps({"prompt": f"p{number}", "answer": "a"}) + "\n")
    assert [row.prompt for row in Rows(Source(path=str(tmp_path / "lines")))] == ["p0", "p1"]
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:1])})
    saved.save_to_disk(tmp_path / "saved")
    assert len(Rows(Source(path=str(tmp_path / "saved"), split="test"))) == 1
    with pytest.raises(DataError, match="has no split 'train'; it has 'test'"):
        Rows(Source(path=str(tmp_path / "saved")))
    saved["test"].save_to_disk(tmp_path / "one")
    assert Rows(Source(path=str(tmp_path / "one")))[0].prompt == "p0"


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "rows.parquet", ROWS[:1])
    with pytest.raises(DataError, match=r"has no field 'question'; it has 'prompt', 'answer', 'n'"):
        Rows(Source(path=str(whole), prompt="question"))
    with pytest.raises(DataError, match="the field 'n' holds int64, not text"):
        Rows(Source(path=str(whole), prompt="n"))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows.parquet can't be read \(.*\): see that its files are whole"):
        Rows(Source(path=str(whole)))
    (tmp_path / "both").mkdir()
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / "both" / name).write_text("{}\n")
    with pytest.raises(DataError, match="files of both kinds"):
        Rows(Source(path=str(tmp_path / "both")))


def test_a_dataset_of_the_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="somebody/something can't be read.*see that the hub can be reached"):
        Rows(Source(hub="somebody/something"))


def conversation(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def test_conversations(tmp_path: Path) -> None:
    talk = [
        conversation(
            ("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")
        ),
        conversation(("user", "open?")),
        conversation(("assistant", "alone")),
        conversation(("wizard", "hm"), ("assistant", "x")),
    ]
    path = parquet(tmp_path / "talk.parquet", [{"messages": said} for said in talk])
    rows = Rows(Source(path=str(path), messages="messages", on_bad_row="skip", thinking=False))
    first, second = rows
    assert (first.prompt, first.answer) == ("two?", "2")
    assert first.chat == Chat(
        (("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?")), thinking=False
    )
    assert (second.prompt, second.answer) == ("open?", "") and rows.bad.count == 2
    learns = Rows(Source(path=str(path), messages="messages", on_bad_row="skip"), needs_answer=True)
    assert len(learns) == 1 and learns.bad.count == 3


# ---- Streams ---------------------------------------------------------------------------------------------------------


def stream(folder: Path, count: int, **settings: Any) -> Source:
    for number in range(3):
        rows = [{"prompt": f"p{i}", "answer": "a"} for i in range(number, count, 3)]
        parquet(folder / f"part-{number}.parquet", rows)
    return Source(path=str(folder), streaming=True, **settings)


def as_dataset(source: Source) -> Any:
    from megatron_dgrpo.config.data import Dataset

    return Dataset.model_validate(source.model_dump(exclude_unset=True))


def test_a_stream_gives_every_row_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    source = PromptSource(as_dataset(stream(tmp_path / "d", 20, shuffle_buffer=8)), seed=1)
    first, second = ([row.prompt for row in source.take(20)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(f"p{i}" for i in range(20))
    assert first != second
    rows = PromptSource(as_dataset(stream(tmp_path / "d", 20, shuffle_buffer=8)), seed=1).take(50)
    assert [row.prompt for row in rows[:40]] == first + second and len({row.name for row in rows}) == 50


@pytest.mark.parametrize("position", [0, 3, 8, 19, 20, 33])
def test_a_stream_goes_on_at_the_sample(tmp_path: Path, position: int) -> None:
    data = as_dataset(stream(tmp_path / "d", 20, shuffle_buffer=8))
    source = PromptSource(data, seed=1)
    source.take(position)
    again = PromptSource(data, seed=1)
    again.restore(json.loads(json.dumps(source.state())))
    assert [row.name for row in again.take(30)] == [row.name for row in source.take(30)]


def test_bad_rows_of_a_stream(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", ROWS)
    source = PromptSource(as_dataset(Source(path=str(path), streaming=True, on_bad_row="skip")), seed=0)
    assert sorted(row.prompt for row in source.take(2)) == ["p0", "é\u2028"]
    source.take(1)  # the next epoch: by now every row was seen
    assert source.facts()["data/skipped"] >= 3
    with pytest.raises(DataError, match="can't be used"):
        PromptSource(as_dataset(Source(path=str(path), streaming=True)), seed=0).take(5)
    useless = parquet(tmp_path / "useless.parquet", [{"prompt": "", "answer": "a"}] * 3)
    with pytest.raises(DataError, match="no row that can be used"):
        PromptSource(as_dataset(Source(path=str(useless), streaming=True, on_bad_row="skip")), seed=0).take(1)

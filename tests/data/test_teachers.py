from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dgrpo.config.data import Dataset
from megatron_dgrpo.data.dataset import Rows
from megatron_dgrpo.data.teachers import check_teachers
from megatron_dgrpo.errors import DataError


def _rows(folder: Path, teachers: list[object]) -> Dataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "answer": "a", "who": who}) + "\n" for who in teachers))
    return Dataset(path=str(path), teacher="who")


def test_each_row_names_a_teacher(tmp_path: Path) -> None:
    rows = Rows(_rows(tmp_path, ["maths", "code", "maths"]))
    assert [row.teacher for row in rows] == ["maths", "code", "maths"]
    assert check_teachers(rows, ["code", "maths", "law"], where="stages.1.data.teacher") == {"code", "maths"}
    plain = Dataset(path=str(tmp_path / "rows.jsonl"))
    assert Rows(plain)[0].teacher is None


def test_names_of_no_teacher_are_listed_with_the_known_ones(tmp_path: Path) -> None:
    rows = Rows(_rows(tmp_path, ["maths", "maht", "code", "law", *["x"] * 30]))
    with pytest.raises(DataError) as caught:
        check_teachers(rows, ["code", "maths"], where="stages.1.data.teacher")
    message = str(caught.value)
    assert "32 rows name a teacher that is not listed (there is 'code', 'maths')" in message
    assert "rows.jsonl:2: 'maht'" in message and "rows.jsonl:4: 'law'" in message and "and 12 more" in message


def test_a_row_without_the_field_or_with_another_type_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2 has a number in the field 'who', not text"):
        Rows(_rows(tmp_path, ["maths", 3]))

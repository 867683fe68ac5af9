from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dgrpo.config.data import Source
from megatron_dgrpo.data.bad_rows import MAX_LISTED
from megatron_dgrpo.data.jsonl import JsonLines
from megatron_dgrpo.data.rows import row_problems
from megatron_dgrpo.errors import DataError

GOOD = b'{"prompt": "a", "answer": "b"}\n'


def lines(path: Path, content: bytes) -> JsonLines:
    path.write_bytes(content)
    return JsonLines(path, lambda row: row_problems(Source(path=str(path)), row))


def refusal(path: Path, content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        lines(path, content).bad.refuse("one JSON object")
    return str(caught.value)


def test_every_row_is_read_at_its_own_place(tmp_path: Path) -> None:
    rows = [{"prompt": f"p\u2028é{'x' * (7 * i)}", "answer": "a\r\n", "n": i} for i in range(50)]
    found = lines(tmp_path / "d", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    assert len(found) == 50
    for i in (49, 0, 17, 18, 3):
        assert found[i] == rows[i]
    for i in (-1, 50):
        with pytest.raises(IndexError):
            found[i]


def test_windows_line_ends_and_a_missing_last_one_are_fine(tmp_path: Path) -> None:
    found = lines(tmp_path / "d", GOOD[:-1] + b"\r\n" + GOOD[:-1])
    assert [found[0]["answer"], found[1]["answer"]] == ["b", "b"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"\n", "is blank"),
        (b'{"prompt": "a", \n', "is not valid JSON"),
        (b'["a"]\n', "is a JSON list, not an object"),
        (b"3\n", "is a JSON number, not an object"),
        (b'{"prompt": "a"}\n', "has no field 'answer' (it has 'prompt')"),
        (b'{"prompt": 1, "answer": "b"}\n', "has a number in the field 'prompt', not text"),
        (b'{"prompt": "a", "answer": null}\n', "has a null in the field 'answer', not text"),
        (b'{"prompt": "a", "answer": ""}\n', "has nothing in the field 'answer'"),
        (b'{"prompt": "a", "answer": "\\ud800"}\n', "has half of a surrogate pair in the field 'answer'"),
        (b'{"prompt": "a\xff", "answer": "b"}\n', "is not UTF-8"),
        (b"[" * 100_000 + b"\n", "is not valid JSON (nested too deeply)"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path: Path, line: bytes, says: str) -> None:
    message = refusal(tmp_path / "rows.jsonl", GOOD + line + GOOD)
    assert f"line 2 {says}" in message
    assert "1 of 3 rows" in message and str(tmp_path / "rows.jsonl") in message


@pytest.mark.parametrize("torn", [GOOD[:-8], '{"prompt": "é'.encode()[:-1]])
def test_a_truncated_last_line_is_called_so(tmp_path: Path, torn: bytes) -> None:
    message = refusal(tmp_path / "d", GOOD + torn)
    assert "line 2" in message and "may be truncated" in message


def test_all_bad_rows_are_counted_and_the_first_ones_listed(tmp_path: Path) -> None:
    message = refusal(tmp_path / "d", (GOOD + b"{}\n") * (MAX_LISTED + 3))
    assert f"{MAX_LISTED + 3} of {2 * MAX_LISTED + 6} rows" in message
    assert message.count("has no field 'prompt'") == MAX_LISTED
    assert "line 2 has" in message and f"line {2 * MAX_LISTED} has" in message and "and 3 more" in message


def test_several_problems_of_one_line_are_all_said(tmp_path: Path) -> None:
    message = refusal(tmp_path / "d", b'{"prompt": "", "answer": 2}\n')
    assert "nothing in the field 'prompt'" in message and "number in the field 'answer'" in message


def test_an_empty_file_a_missing_one_and_a_folder(tmp_path: Path) -> None:
    assert len(lines(tmp_path / "d", b"")) == 0
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="can't be read"):
            JsonLines(path, lambda row: [])


def test_good_rows_between_bad_ones_keep_their_lines(tmp_path: Path) -> None:
    found = lines(tmp_path / "d", b"{}\n" + GOOD + b"\n" + b'{"prompt": "c", "answer": "d"}\n' + GOOD[:-4])
    assert found.numbers.tolist() == [2, 4] and [row["prompt"] for row in (found[0], found[1])] == ["a", "c"]
    assert (found.bad.count, found.bad.num_good) == (3, 2)


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    found = lines(tmp_path / "d", GOOD * 3)
    (tmp_path / "d").write_bytes(GOOD * 4)
    with pytest.raises(DataError, match="has changed"):
        found[1]

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_dgrpo.config.data import Dataset, Source
from megatron_dgrpo.data.dataset import PromptSource, Rows
from megatron_dgrpo.data.shuffle import shuffled
from megatron_dgrpo.errors import DataError


def dataset(folder: Path, count: int, name: str = "rows") -> Dataset:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"q": f"q{i}", "a": f"a{i}", "kind": i % 3}) + "\n" for i in range(count)))
    return Dataset(path=str(path), prompt="q", answer="a")


def test_rows_have_names_texts_and_everything_else(tmp_path: Path) -> None:
    rows = Rows(dataset(tmp_path, 5))
    assert len(rows) == 5
    assert (rows[3].name, rows[3].prompt, rows[3].answer, rows[3].fields["kind"]) == ("rows.jsonl:4", "q3", "a3", 0)
    assert rows[-1] == rows[4]
    assert [row.answer for row in rows[1:9]] == ["a1", "a2", "a3", "a4"]
    for index in (5, -6):
        with pytest.raises(IndexError):
            rows[index]


def test_bad_rows_are_refused_or_skipped_and_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = [{"prompt": f"p{i}", "answer": "a"} for i in range(3)]
    lines = [good[0], {"prompt": ""}, good[1], {"prompt": "x"}, {"prompt": "y", "other": 1}, good[2]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    with pytest.raises(DataError, match=r"4 of 7 rows(.|\n)*line 2 has nothing(.|\n)*set on_bad_row: skip"):
        Rows(Source(path=str(path)))
    rows = Rows(Source(path=str(path), on_bad_row="skip"))
    assert [(row.name, row.prompt) for row in rows] == [
        ("rows.jsonl:1", "p0"), ("rows.jsonl:3", "p1"), ("rows.jsonl:6", "p2"),
    ]  # fmt: skip
    assert rows.bad.reasons == {
        "has no field 'answer'": 2, "has nothing in the field 'prompt'": 1, "is not valid JSON": 1,
    }  # fmt: skip
    assert rows.bad.summary().startswith(f"{path}: 4 of 7 rows were skipped (2 has no field 'answer', ")
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"is empty: it needs a row at least \(.*1 of 1 rows were skipped"):
        Rows(Source(path=str(path), on_bad_row="skip"))


def test_a_prompt_of_several_fields_and_rows_without_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"document": "long {text}", "question": "what?"}) + "\n")
    (row,) = Rows(Source(path=str(path), format="{document}\n\n{question} {{}}", answer=None))
    assert (row.prompt, row.answer) == ("long {text}\n\nwhat? {}", "")
    with pytest.raises(DataError, match="has no field 'title'"):
        Rows(Source(path=str(path), format="{document} {title}", answer=None))


def test_an_epoch_has_every_row_once_and_the_next_another_order(tmp_path: Path) -> None:
    source = PromptSource(dataset(tmp_path, 40), seed=3)
    first, second = ([row.prompt for _ in range(5) for row in source.take(8)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(f"q{i}" for i in range(40))
    assert first != second and first != [f"q{i}" for i in range(40)]


def test_whoever_goes_on_from_a_state_gets_the_same_rows(tmp_path: Path) -> None:
    data = dataset(tmp_path, 11)
    source = PromptSource(data, seed=0)
    batches, states = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(source.state())))
        batches.append(source.take(4))
    for step in (11, 2, 7, 0):
        again = PromptSource(data, seed=0)
        again.restore(states[step])
        assert again.take(4) == batches[step]
    flat = [row.name for batch in batches for row in batch]
    assert flat == [row.name for row in PromptSource(data, seed=0).take(48)], "the order does not depend on batches"
    with pytest.raises(DataError, match="has 12 rows and had 11"):
        PromptSource(dataset(tmp_path, 12), seed=0).restore(states[3])


def test_orders_of_seeds_epochs_and_sources_differ() -> None:
    orders = {tuple(shuffled(30, s, e, i, b)) for s in range(3) for e in range(3) for i in range(3) for b in range(3)}
    assert len(orders) == 81


def test_the_order_is_this_one_for_good() -> None:
    assert shuffled(8, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert shuffled(8, 1, 2, source=1, block=2).tolist() == [4, 2, 1, 0, 7, 3, 6, 5]


def test_names_are_unique_in_a_batch_larger_than_the_data(tmp_path: Path) -> None:
    source = PromptSource(dataset(tmp_path, 3), seed=0)
    source.take(8)
    batch = source.take(8)
    assert len({row.name for row in batch}) == 8
    assert max(Counter(row.prompt for row in batch).values()) == 3
    assert batch[0].name.split("@")[1] == "2" and batch[-1].name.split("@")[1] == "5"


# ---- Mixtures --------------------------------------------------------------------------------------------------------


def lengths(row: object) -> int:
    """Rows of very different lengths: 100 to 490 tokens in the long source, 1 to 9 in the short one."""
    number = int(row.prompt.removeprefix("q"))  # type: ignore[attr-defined]
    return 100 + 10 * number if "long" in row.name else 1 + number % 9  # type: ignore[attr-defined]


def mixture(folder: Path, short: float, long: float) -> Dataset:
    sources = [dataset(folder, 17, "short").model_dump(), dataset(folder, 40, "long").model_dump()]
    for source, share in zip(sources, (short, long), strict=True):
        source.pop("mixture")
        source["share"] = share
    return Dataset.model_validate({"mixture": sources})


@pytest.mark.parametrize(("short", "long"), [(10, 90), (0.5, 0.5), (3, 1)])
def test_a_mixture_has_its_shares_of_tokens_in_every_window(tmp_path: Path, short: float, long: float) -> None:
    source = PromptSource(mixture(tmp_path, short, long), seed=5, num_tokens=lengths)
    drawn = [(row.name.startswith("long"), lengths(row)) for row in source.take(6000)]
    asked = long / (short + long)
    for start in range(0, 6000, 500):
        tokens = [0, 0]
        for is_long, count in drawn[start:]:
            tokens[is_long] += count
            if sum(tokens) >= 60_000:
                assert abs(tokens[1] / sum(tokens) - asked) <= 490 / 60_000 + 1e-9
                break
    total = sum(count for _, count in drawn)
    assert abs(sum(count for is_long, count in drawn if is_long) / total - asked) <= 0.01
    facts = source.facts()
    assert set(facts) == {"mixture/short.jsonl", "mixture/long.jsonl"} and sum(facts.values()) == pytest.approx(1)
    assert facts["mixture/long.jsonl"] == pytest.approx(asked, abs=0.01)


def test_a_mixture_goes_on_at_the_sample(tmp_path: Path) -> None:
    data = mixture(tmp_path, 10, 90)
    source = PromptSource(data, seed=5, num_tokens=lengths)
    source.take(137)
    state = json.loads(json.dumps(source.state()))
    again = PromptSource(data, seed=5, num_tokens=lengths)
    again.restore(state)
    assert again.take(200) == source.take(200)
    with pytest.raises(DataError, match="has 1 sources and had 2"):
        PromptSource(dataset(tmp_path, 3), seed=5).restore(state)


def test_a_batch_of_tokens(tmp_path: Path) -> None:
    source = PromptSource(mixture(tmp_path, 10, 90), seed=5, num_tokens=lengths)
    for _ in range(5):
        counts = [lengths(row) for row in source.take_tokens(3000)]
        assert sum(counts) >= 3000 > sum(counts[:-1])


def test_two_sources_of_one_name_keep_their_rows_apart(tmp_path: Path) -> None:
    parts = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        parts.append({"path": dataset(tmp_path / folder, 2).path, "prompt": "q", "answer": "a"})
    names = [row.name for row in PromptSource(Dataset.model_validate({"mixture": parts}), seed=0).take(4)]
    assert len(set(names)) == 4 and {name.split(":")[0] for name in names} == {"rows.jsonl#1", "rows.jsonl#2"}

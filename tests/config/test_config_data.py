"""Data sections that contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_dgrpo.config.data import Dataset, problems


def found(needs_answer: bool = False, **settings: Any) -> list[str]:
    return list(problems("data", Dataset.model_validate(settings), needs_answer=needs_answer))


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "a.jsonl"},
        {"hub": "a/b", "subset": "c", "revision": "main", "streaming": True},
        {"path": "a", "format": "{document} {{literal}} {question}", "answer": None},
        {"path": "a", "messages": "talk", "system": "be brief", "thinking": False},
        {"mixture": [{"path": "a", "share": 0.1}, {"hub": "b", "share": 0.9}]},
    ],
)
def test_what_is_in_order(settings: dict[str, Any]) -> None:
    assert found(**settings) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "data: names no place; give a path, a hub name or a mixture"),
        ({"path": "a", "hub": "b"}, "data: path and hub name two places; keep one"),
        ({"path": "a", "revision": "main"}, "data: subset and revision belong to a dataset on the hub; remove them"),
        ({"path": "a", "format": "always this"}, "data.format: names no field in braces"),
        ({"path": "a", "format": "{a.b}"}, "data.format: {a.b}: braces hold the name of a field and nothing else"),
        ({"path": "a", "format": "{0}"}, "data.format: {0}: braces hold the name"),
        ({"path": "a", "format": "{"}, "data.format: "),
        ({"path": "a", "format": "{x}", "prompt": "y"}, "data.format: prompt names a field, too"),
        ({"path": "a", "messages": "m", "answer": "y"}, "data.messages: the conversation has prompt and answer"),
        ({"path": "a", "thinking": True}, "data.chat: system and thinking are parts of a chat template"),
        ({"mixture": [{"path": "a"}]}, "data.mixture: has one source"),
        ({"path": "b", "mixture": [{"path": "a"}, {"path": "c"}]}, "data.mixture: path beside it belong to no source"),
        ({"mixture": [{"path": "a"}, {"hub": "b", "path": "c"}]}, "data.mixture.1: path and hub name two places"),
    ],
)
def test_what_is_contradictory(settings: dict[str, Any], says: str) -> None:
    (problem,) = found(**settings)
    assert problem.startswith(says)


def test_a_stage_that_learns_from_answers_needs_them() -> None:
    assert found(path="a", answer=None) == []
    assert found(needs_answer=True, path="a", answer=None)[0].startswith("data.answer: null, and this stage learns")
    with pytest.raises(ValidationError):
        Dataset(path="a", share=0)


def test_fields_that_must_have_text() -> None:
    assert Dataset(path="a").text_fields == ("prompt", "answer")
    assert Dataset(path="a", format="{b} {a} {b}", answer="a").text_fields == ("b", "a")
    assert Dataset(path="a", messages="m").text_fields == ()

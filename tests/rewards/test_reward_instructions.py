"""Verifiable constraints, the detector of languages, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.config.constraints import Constraint
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.instructions import Instructions, count, meets
from megatron_dgrpo.rewards.json_form import JsonValid
from megatron_dgrpo.rewards.language import language_of

CONSTRAINT: TypeAdapter[Constraint] = TypeAdapter(Constraint)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"kind": "length", "at_least": 2, "at_most": 3}, ["a b", "a b\nc"], ["a", "a b c d", ""]),
        ({"kind": "length", "unit": "sentences", "at_most": 1}, ["It costs 3.5 euros."], ["No. Yes!"]),
        ({"kind": "length", "unit": "paragraphs", "at_least": 2}, ["a\n\nb", "a\n \n\nb"], ["a\nb"]),
        ({"kind": "length", "unit": "characters", "at_most": 3}, ["abc", " abc "], ["abcd"]),
        ({"kind": "length", "unit": "lines", "at_least": 2, "at_most": 2}, ["a\n\nb"], ["a"]),
        ({"kind": "keywords", "words": ["Sun", "red dog"]}, ["The sun, the red dog."], ["sunny red dog", "sun"]),
        ({"kind": "keywords", "words": ["sun"], "at_least": 2}, ["sun sun"], ["sun"]),
        ({"kind": "keywords", "words": ["sun"], "at_least": 0, "at_most": 0}, ["sunny", ""], ["the SUN"]),
        ({"kind": "format", "form": "json"}, ['{"a": 1}', "```json\n[1]\n```"], ["1", "{a: 1}"]),
        ({"kind": "format", "form": "bullets"}, ["- a\n* b"], ["- a\nb", "", "-a"]),
        ({"kind": "format", "form": "numbered"}, ["1. a\n\n2) b"], ["- a"]),
        ({"kind": "format", "form": "title"}, ["<<A title>>\ntext", "# A title"], ["A title", "<<>>", "#title"]),
        ({"kind": "format", "form": "quoted"}, ['"a"'], ["a", '"']),
        ({"kind": "format", "form": "upper"}, ["ABC 1!"], ["ABc", "123"]),
        ({"kind": "format", "form": "lower"}, ["abc 1!"], ["abC", ""]),
        ({"kind": "format", "form": "no_commas"}, ["a; b"], ["a, b", "a\N{IDEOGRAPHIC COMMA}b", ""]),
        ({"kind": "format", "form": "plain"}, ["a - b * c"], ["# a", "**a**", "| a |", "```\n```"]),
        ({"kind": "bullets", "at_least": 2, "at_most": 2}, ["so:\n- a\n- b\nend"], ["- a", "- a\n- b\n- c"]),
        ({"kind": "ends", "starts_with": "Dear", "ends_with": "Bye."}, ["\nDear you. Bye. \n"], ["Dear", "Bye."]),
        ({"kind": "language", "language": "de"}, ["Das ist nicht der Hund, der bellt."], ["That is not the dog.", ""]),
    ],
)
def test_what_meets_a_constraint(constraint: dict[str, Any], good: list[str], bad: list[str]) -> None:
    read = CONSTRAINT.validate_python(constraint)
    assert [text for text in good if not meets(text, read)] == []
    assert [text for text in bad if meets(text, read)] == []


def test_counts() -> None:
    assert count("One. Two? Three! 3.14 is no end", "sentences") == 4
    assert count("", "sentences") == count("...", "sentences") == count("", "paragraphs") == count("", "lines") == 0


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat is on the table and it was not there before.", "en"),
        ("Die Katze ist auf dem Tisch und war vorher nicht da.", "de"),
        ("Le chat est sur la table et il n'est pas dans le jardin.", "fr"),
        ("El gato está en la mesa y no en el jardín, como es su costumbre.", "es"),
        ("Il gatto è sul tavolo e non nel giardino, come sono gli altri.", "it"),
        ("O gato está na mesa e não no jardim, como são os outros.", "pt"),
        ("De kat is op de tafel en niet in het huis van de buren.", "nl"),
        ("Кошка на столе, а собака в саду.", "ru"),
        ("الطقس جميل اليوم", "ar"),
        ("猫は机の上にいます", "ja"),
        ("猫在桌子上，狗在花园里", "zh"),
        ("고양이가 탁자 위에 있다", "ko"),
        ("Das Wort \N{LEFT DOUBLE QUOTATION MARK}猫\N{RIGHT DOUBLE QUOTATION MARK} ist nicht aus dem Deutschen.", "de"),
        ("12 + 30 = 42", None),
        ("", None),
        ("xyzzy plugh frobnicate", None),
    ],
)
def test_languages(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_all_or_a_share_of_settings_and_row() -> None:
    own = [{"kind": "length", "at_most": 3}]
    of_row = [{"kind": "keywords", "words": ["sun"]}]

    def score(text: str, how: str, row: Any) -> float:
        made = settings.Instructions.model_validate(
            {"kind": "instructions", "constraints": own, "field": "rules", "score": how}
        )
        return Instructions(made).score(Sample("r", text, fields={"rules": row}))

    assert score("the sun", "all", of_row) == 1.0
    assert score("the sun is up", "all", of_row) == 0.0
    assert score("the sun is up", "share", of_row) == 0.5
    assert score("the moon", "all", []) == 1.0
    for bad in ("short", [{"kind": "lenght"}], [{"kind": "length", "at_mots": 1}], None):
        with pytest.raises(RewardError, match="'rules' is no list of constraints"):
            score("x", "all", bad)


def test_json(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}))

    def score(text: str, **changes: Any) -> float:
        return JsonValid(settings.JsonValid(kind="json_valid", **changes)).score(Sample("r", text))

    assert [score(text) for text in ('{"a": 1}', "3", ' [1, "x"] ')] == [1, 1, 1]
    for bad in ("", "{a: 1}", "{'a': 1}", "[1,]", "NaN", '{"a": 1, "a": 2}', '{"a": 1} yes', "[" * 100_000):
        assert score(bad) == 0.0, bad
    block = 'Here it is:\n```json\n{"a": 1}\n```\nDone.'
    assert score(block) == 1.0 and score(block, fenced=False) == 0.0
    assert score('{"a": 1, "b": 2}', required=["a", "b"]) == 1.0
    assert score('{"a": 1}', required=["a", "b"]) == score('["a", "b"]', required=["a", "b"]) == 0.0
    pytest.importorskip("jsonschema", reason="jsonschema, of the extra `rewards`, is not installed")
    assert score('{"n": 2}', schema_file=str(schema)) == 1.0
    assert score('{"n": 0}', schema_file=str(schema)) == score("3", schema_file=str(schema)) == 0.0
    for text in ("{", '{"type": "objekt"}'):
        schema.write_text(text)
        with pytest.raises(RewardError, match="is no JSON Schema"):
            score("{}", schema_file=str(schema))

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.data.compatibility import check_fits, check_same, differences
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.testing.tiny import save_tokenizer

BPE = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 5, "content": "<e>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}, "merges": [["a", "b"], ["b", "c"]],
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    },
}  # fmt: skip


def bpe(folder: Path, change: Callable[[dict[str, Any]], object] = lambda parts: None) -> Tokenizer:
    parts = json.loads(json.dumps(BPE))
    change(parts)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "<e>"}')
    return Tokenizer.load(folder)


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    assert differences(bpe(tmp_path / "a"), bpe(tmp_path / "b")) == []


def test_merges_written_in_the_older_way_are_the_same(tmp_path: Path) -> None:
    old = bpe(tmp_path / "old", lambda p: p["model"].update(merges=["a b", "b c"]))
    assert differences(bpe(tmp_path / "new"), old) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["model"]["vocab"].update(a=1, b=0), "2 tokens with different ids: 'a' is 0 and 1, 'b' is 1 and 0"),
        (lambda p: p["model"]["vocab"].update(d=6), "1 tokens only in the second: 'd'"),
        (lambda p: p["model"].update(merges=[["b", "c"], ["a", "b"]]), "merges differ (2 and 2 of them)"),
        (lambda p: p.update(normalizer={"type": "NFKC"}), 'normalizer: {"type": "NFC"} and {"type": "NFKC"}'),
        (lambda p: p.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer: "),
        (
            lambda p: p["added_tokens"].append(p["added_tokens"][0] | {"id": 6, "content": "<t>"}),
            "1 added tokens: id 6",
        ),
    ],
)
def test_each_difference_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    a, b = bpe(tmp_path / "a"), bpe(tmp_path / "b", change)
    assert any(says in line for line in differences(a, b)), differences(a, b)
    assert differences(b, a)


def test_the_roles_of_special_tokens_count(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "a", ["x"])
    save_tokenizer(tmp_path / "b", ["x"], starts_with_bos=False)
    save_tokenizer(tmp_path / "c", ["x"])
    config = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    a, b, c = (Tokenizer.load(tmp_path / name) for name in "abc")
    assert differences(a, b) == ["prompt prefix: [1] and []"]
    assert differences(a, c) == ["eos token: 2 and 3"]


def test_the_error_lists_all_differences_of_all_models(tmp_path: Path) -> None:
    for name, words in (("student", ["x", "y"]), ("one", ["y", "x"]), ("two", ["x", "y", "z"]), ("same", ["x", "y"])):
        save_tokenizer(tmp_path / name, words)
    named = {name: Tokenizer.load(tmp_path / name) for name in ("student", "same", "one", "two")}
    check_same({name: named[name] for name in ("student", "same")})
    with pytest.raises(ConfigError) as caught:
        check_same(named)
    message = str(caught.value)
    assert "and one (" in message and "'x' is 0 and 1" in message
    assert "and two (" in message and "only in the second: 'z'" in message
    assert "and same (" not in message


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, ["x", "y"])
    tokenizer = Tokenizer.load(tmp_path)
    check_fits("student", tokenizer, 5)
    with pytest.raises(ConfigError, match="ids up to 4, and the model a vocabulary of 4"):
        check_fits("student", tokenizer, 4)

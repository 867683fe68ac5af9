from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dgrpo.data import tokenizer as subject
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.testing.tiny import save_tokenizer

SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|im_end|>")


def save_byte_level(folder: Path, *, bos: bool = False, eos_too: bool = False, generation: object = None) -> Path:
    """A byte-level BPE as those of Qwen and Llama 3 are: special tokens outside of the vocabulary of the BPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the capital of France is Paris and the end of text"] * 20, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos:
        end = f" {SPECIAL[1]}" if eos_too else ""
        ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A{end}", special_tokens=ids)
    names = {"eos_token": SPECIAL[1], "extra_special_tokens": [SPECIAL[2]], "bos_token": SPECIAL[0]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> subject.Tokenizer:
    return subject.Tokenizer.load(save_byte_level(tmp_path_factory.mktemp("bpe")))


def test_plain_text_round_trips_and_equals_transformers(byte_level: subject.Tokenizer) -> None:
    text = "  the capital\n of   Françe is Paris 🙂 "
    reference = AutoTokenizer.from_pretrained(byte_level.folder)
    assert byte_level.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert byte_level.decode(byte_level.encode(text)) == text


def test_special_tokens_in_a_document_are_text(byte_level: subject.Tokenizer) -> None:
    text = "a<|endoftext|>b <|im_end|>\n"
    reference = AutoTokenizer.from_pretrained(byte_level.folder)
    eos = reference.eos_token_id
    assert eos in reference(text)["input_ids"], "the case must be one where transformers' default is another"
    ids = byte_level.encode(text)
    assert not set(ids) & set(reference.all_special_ids)
    assert byte_level.decode(ids) == text
    assert len(byte_level.encode("<think>")) == 1


def test_a_prompt_starts_with_bos_only_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    plain = subject.Tokenizer.load(save_byte_level(tmp_path / "plain"))
    assert plain.prefix == () and plain.encode_prompt("the end") == plain.encode("the end")
    for eos_too in (False, True):
        begins = subject.Tokenizer.load(save_byte_level(tmp_path / f"bos{eos_too}", bos=True, eos_too=eos_too))
        assert begins.prefix == (begins.bos_id,)
        assert begins.encode_prompt("the end") == [begins.bos_id, *begins.encode("the end")]
        assert begins.eos_id not in begins.encode_prompt("the end")


def test_what_ends_a_response(tmp_path: Path) -> None:
    first = subject.Tokenizer.load(save_byte_level(tmp_path / "a", generation=None))
    start, end, turn = (first._backend.token_to_id(token) for token in SPECIAL)
    assert first.eos_ids == (end,)
    both = subject.Tokenizer.load(save_byte_level(tmp_path / "b", generation=[turn, end]))
    assert both.eos_ids == (end, turn) and both.eos_id == end
    assert both.decode([*both.encode("Paris"), turn]) == "Paris"
    assert both.decode([*both.encode("Paris"), end]) == "Paris"
    assert both.decode([*both.encode("Paris"), end, end]) == "Paris<|endoftext|>"
    assert both.decode([turn, *both.encode("Paris"), start]) == "<|im_end|>Paris<|startoftext|>"
    assert both.decode([]) == both.decode([end]) == ""


def test_ids_without_a_token_are_seen_in_the_text(byte_level: subject.Tokenizer) -> None:
    unused = byte_level.num_ids
    assert byte_level._backend.id_to_token(unused) is None
    assert byte_level._backend.id_to_token(unused - 1) is not None
    paris = byte_level.encode("Paris")
    assert byte_level.decode([*paris, unused]) == "Paris\N{REPLACEMENT CHARACTER}"
    assert byte_level.decode([unused + 7, *paris, byte_level.eos_id]) == "\N{REPLACEMENT CHARACTER}Paris"


def test_words_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    special = save_tokenizer(tmp_path, ["a", "b"])
    words = subject.Tokenizer.load(tmp_path)
    assert (words.bos_id, words.eos_id, words.num_ids) == (special[0], special[1], 5)
    assert words.encode_prompt("b a") == [special[0], 1, 0]
    for text in ("a c", "a <eos>"):
        with pytest.raises(DataError, match="can't encode"):
            words.encode(text)


def test_a_special_token_that_leaks_out_of_text_is_refused(tmp_path: Path) -> None:
    """Where the special token is a word of the vocabulary itself, splitting it does not help."""
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token=None).save_pretrained(tmp_path)
    words = subject.Tokenizer.load(tmp_path)
    assert words.encode("a a") == [0, 0]
    with pytest.raises(DataError, match=r"special tokens \(</s>\) of the plain text"):
        words.encode("a </s>")


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        subject.Tokenizer.load(tmp_path)
    save_byte_level(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="can't be loaded"):
        subject.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(DataError, match="must be an id or a list of ids"):
        subject.Tokenizer.load(tmp_path)


def test_without_any_end_of_sequence(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=None, bos_token=None).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="names a token that ends a sequence"):
        subject.Tokenizer.load(tmp_path)

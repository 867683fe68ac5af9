from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dgrpo.data.lengths import check_lengths
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.testing.tiny import save_tokenizer

ROWS = [PromptRow(f"d.jsonl:{n}", "a " * n, "b b") for n in range(1, 31)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path, ["a", "b"])
    return Tokenizer.load(tmp_path)


def test_prompt_bos_answer_and_end_count(tokenizer: Tokenizer) -> None:
    assert check_lengths(ROWS, tokenizer, limit=1 + 30 + 2 + 1, setting="stages.0.micro_batch_tokens") == 0
    with pytest.raises(DataError) as caught:
        check_lengths(ROWS, tokenizer, limit=32, setting="stages.0.micro_batch_tokens")
    message = str(caught.value)
    assert "2 rows" in message and "stages.0.micro_batch_tokens=32" in message
    assert "d.jsonl:29: 30 tokens of prompt and 3 of response make 33" in message and "d.jsonl:28" not in message


def test_a_sampled_response_takes_its_room(tokenizer: Tokenizer) -> None:
    assert check_lengths(ROWS[:4], tokenizer, limit=13, setting="max_model_len", response_tokens=8) == 0
    with pytest.raises(DataError, match="1 rows"):
        check_lengths(ROWS[:4], tokenizer, limit=12, setting="max_model_len", response_tokens=8)
    with pytest.raises(DataError, match="30 rows.*max_model_len=5(.|\n)*and 10 more"):
        check_lengths(ROWS, tokenizer, limit=5, setting="max_model_len", response_tokens=8)


def test_short_texts_need_no_tokenizer_and_what_is_not_checked_is_counted(tokenizer: Tokenizer) -> None:
    unknown = [PromptRow("d.jsonl:1", "c c c", "d")]  # words that the tokenizer refuses: it is not asked
    assert check_lengths(unknown, tokenizer, limit=2000, setting="max_model_len", response_tokens=8) == 0
    # 60, 58, ... bytes: of 100 bytes that may be tokenised, the first row takes 60, and the one of 40 the rest
    rows = ROWS[::-1]
    assert check_lengths(rows, tokenizer, limit=40, setting="x", response_tokens=8, checked_bytes=100) == 28

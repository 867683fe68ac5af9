"""Rows that are too long are found before anything starts, and are never cut or left out.

A text has no more tokens than it has bytes (and a token or two that templates and tokenizers put before it), so that
short rows need no tokenizer. The others are tokenised, up to a number of bytes; what is left is
counted and said.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from megatron_dgrpo.data.bad_rows import MAX_LISTED
from megatron_dgrpo.data.chat import prompt_ids
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import DataError, listing

CHECKED_BYTES = 2**30
"""Text that is tokenised for this check."""
_TEMPLATE_TOKENS = 512
"""More than what a template puts around a message."""


def check_lengths(
    rows: Iterable[PromptRow],
    tokenizer: Tokenizer,
    *,
    limit: int,
    setting: str,
    response_tokens: int | None = None,
    checked_bytes: int = CHECKED_BYTES,
) -> int:
    """Each prompt with its response must fit the limit that `setting` gives. Returns how many rows were not checked.

    The response is `response_tokens` long where it is to be sampled, and else the row's answer with its end.
    """
    num_bad, left, unchecked, problems = 0, checked_bytes, 0, []
    for row in rows:
        size = _num_bytes(row, response_tokens is None)
        if 2 * size + _TEMPLATE_TOKENS + (response_tokens or 1) <= limit:
            continue
        if size > left:
            unchecked += 1
            continue
        left -= size
        prompt = len(prompt_ids(tokenizer, row))
        response = len(tokenizer.encode(row.answer)) + 1 if response_tokens is None else response_tokens
        if prompt + response > limit:
            num_bad += 1
            if num_bad <= MAX_LISTED:
                problems.append(
                    f"{row.name}: {prompt} tokens of prompt and {response} of response make {prompt + response}"
                )
    if num_bad:
        more = [f"and {num_bad - MAX_LISTED} more"] if num_bad > MAX_LISTED else []
        title = f"{num_bad} rows are longer than {setting}={limit} allows; raise it, or take the rows out:"
        raise DataError(listing(title, problems + more))
    return unchecked


def longest(rows: Iterable[PromptRow], tokenizer: Tokenizer, *, looked_at: int = 16) -> tuple[int, int]:
    """Tokens of the prompt and of the answer with its end, of the longest row: that with most tokens among those with
    most text."""
    largest = heapq.nlargest(looked_at, rows, key=lambda row: _num_bytes(row, True))
    counted = [(len(prompt_ids(tokenizer, row)), len(tokenizer.encode(row.answer)) + 1) for row in largest]
    return max(counted, key=sum)


def _num_bytes(row: PromptRow, with_answer: bool) -> int:
    texts = [content for _, content in row.chat.messages] if row.chat is not None else [row.prompt]
    return sum(len(text.encode()) for text in [*texts, *([row.answer] if with_answer else [])])

"""Rows that are too long are found before anything starts, and are never cut or left out."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_dgrpo.data.dataset import PromptRow
from megatron_dgrpo.data.jsonl import MAX_LISTED
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import DataError, listing


def check_lengths(
    rows: Iterable[PromptRow], tokenizer: Tokenizer, *, limit: int, setting: str, response_tokens: int | None = None
) -> int:
    """Each prompt with its response must fit the limit that `setting` gives. Returns the longest of them, in tokens.

    The response is `response_tokens` long where it is to be sampled, and else the row's answer with its end.
    """
    longest, num_bad, problems = 0, 0, []
    for row in rows:
        prompt = len(tokenizer.encode_prompt(row.prompt))
        response = len(tokenizer.encode(row.answer)) + 1 if response_tokens is None else response_tokens
        longest = max(longest, prompt + response)
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
    return longest

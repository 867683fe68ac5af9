"""A conversation through a tokenizer's chat template, to token ids.

A template writes special tokens as text, and what people say may contain the same text: "<|im_end|>" in a document must
not end a turn. So the special strings in what is said are replaced by characters that stand for nothing else, the
template is rendered, and only then is the text cut at the special tokens that the template itself wrote; everything
between them is tokenised as plain text, with what was said put back.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megatron_dgrpo.data.rows import Chat, PromptRow
from megatron_dgrpo.errors import DataError

if TYPE_CHECKING:
    from megatron_dgrpo.data.tokenizer import Tokenizer

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
"""Characters for private use, around the number of a special token."""


def prompt_ids(tokenizer: Tokenizer, row: PromptRow) -> list[int]:
    """A row's prompt: plain text, or a conversation."""
    return encode_chat(tokenizer, row.chat) if row.chat is not None else tokenizer.encode_prompt(row.prompt)


def encode_chat(tokenizer: Tokenizer, chat: Chat) -> list[int]:
    special = tokenizer.special_strings
    pattern = re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or r"(?!)")
    foreign = any(pattern.search(content) for _, content in chat.messages)
    if not foreign:
        return tokenizer.encode_template(_render(tokenizer, chat.messages, chat.thinking))
    order = list(special)

    def hide(content: str) -> str:
        if _OPEN in content or _CLOSE in content:
            raise DataError(
                f"a message contains U+{ord(_OPEN):X} or U+{ord(_CLOSE):X}, characters for private use, beside the "
                "text of a special token: remove them from the data"
            )
        return pattern.sub(lambda found: f"{_OPEN}{order.index(found.group())}{_CLOSE}", content)

    def show(text: str) -> str:
        return re.sub(f"{_OPEN}(\\d+){_CLOSE}", lambda found: order[int(found.group(1))], text)

    text = _render(tokenizer, [(role, hide(content)) for role, content in chat.messages], chat.thinking)
    ids: list[int] = []
    position = 0
    for found in pattern.finditer(text):
        ids += tokenizer.encode(show(text[position : found.start()]))
        ids.append(special[found.group()])
        position = found.end()
    return ids + tokenizer.encode(show(text[position:]))


def _render(tokenizer: Tokenizer, messages: Any, thinking: bool | None) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.render_chat(conversation, {} if thinking is None else {"enable_thinking": thinking})

"""What is read of a row, whatever it is stored in, and what can be wrong with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dgrpo.config.data import Source

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Chat:
    """A conversation that the model is to continue."""

    messages: tuple[tuple[str, str], ...]
    """(role, content), in order."""
    thinking: bool | None = None


@dataclass(frozen=True)
class PromptRow:
    """One row. Its name is the source's name and the row's number; `PromptSource` adds `@epoch`."""

    name: str
    prompt: str
    """The prompt's text; of a conversation, what was said last."""
    answer: str
    """Empty where rows have none."""
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The whole row, for rewards that need more than the answer."""
    chat: Chat | None = None
    """With a chat template: all that the prompt consists of."""
    teacher: str | None = None
    """Name of the teacher that scores it, where the data say so."""


def make_row(source: Source, number: int, row: Mapping[str, Any]) -> PromptRow:
    """A row without problems; `number` counts from 1."""
    name = f"{source.name}:{number}"
    teacher = row[source.teacher] if source.teacher is not None else None
    if source.messages is not None:
        said = [(message["role"], message["content"]) for message in row[source.messages]]
        answer = said.pop()[1] if said[-1][0] == "assistant" else ""
        return PromptRow(name, said[-1][1], answer, row, _chat(source, said), teacher)
    if source.format is not None:
        prompt = source.format.format_map({name: row[name] for name in source.prompt_fields})
    else:
        prompt = row[source.prompt]
    answer = row[source.answer] if source.answer is not None else ""
    chat = _chat(source, [("user", prompt)]) if source.chat else None
    return PromptRow(name, prompt, answer, row, chat, teacher)


def _chat(source: Source, said: Sequence[tuple[str, str]]) -> Chat:
    first = [("system", source.system)] if source.system is not None else []
    return Chat((*first, *said), source.thinking)


def row_problems(source: Source, row: Mapping[str, Any], *, needs_answer: bool = False) -> list[str]:
    """What keeps a row from being used, in words that go on after the row's number; none if it can be used."""
    found = [wrong for name in source.text_fields if (wrong := text_problem(row, name))]
    if source.messages is not None:
        found += messages_problem(row, source.messages, needs_answer)
    return found


def text_problem(row: Mapping[str, Any], name: str) -> str | None:
    if name not in row:
        return f"has no field {name!r} (it has {', '.join(map(repr, row)) or 'none'})"
    value = row[name]
    if not isinstance(value, str):
        return f"has a {kind(value)} in the field {name!r}, not text"
    if not value:
        return f"has nothing in the field {name!r}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"has half of a surrogate pair in the field {name!r}, which is no text"
    return None


def messages_problem(row: Mapping[str, Any], name: str, needs_answer: bool) -> list[str]:
    said = row.get(name)
    if not isinstance(said, list) or not said:
        return [f"has no list of messages in the field {name!r}"]
    for number, message in enumerate(said):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            return [f"has no role ({', '.join(ROLES)}) in message {number} of the field {name!r}"]
        if wrong := text_problem(message, "content"):
            return [f"{wrong} of message {number} in the field {name!r}"]
    answered = said[-1]["role"] == "assistant"
    if needs_answer and not answered:
        return [f"ends in the field {name!r} with what {said[-1]['role']} says, and has no answer of an assistant"]
    if len(said) == 1 and answered:
        return [f"has an answer in the field {name!r} and nothing before it"]
    return []


def kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), "null")

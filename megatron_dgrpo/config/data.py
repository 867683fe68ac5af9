"""The data's sections of a config: where rows come from, what is read of them, and mixtures of several sources."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import Frozen

ROW_FILES = (".jsonl", ".parquet")
"""What a file of rows, or the files of a folder, are called."""

SAVED_DATASET = ("dataset_dict.json", "state.json")
"""Either marks a folder that the library `datasets` has saved."""


class Source(Frozen):
    """Rows of a file, of a folder, or of a dataset of the Hugging Face hub."""

    path: str | None = None
    """A .jsonl or .parquet file, or a folder that holds such files or was saved by the library `datasets`."""
    hub: str | None = None
    """A dataset's name on the hub, in place of a path."""
    subset: str | None = None
    """Of a dataset on the hub: the name of one of its configurations."""
    revision: str | None = None
    """Of a dataset on the hub: a commit, a branch or a tag."""
    split: str = "train"
    """Of a dataset on the hub, or of a saved folder that has several."""
    streaming: bool = False
    """Read rows as they are needed, never all of them: nothing is checked beforehand, and rows are shuffled within a
    buffer."""
    shuffle_buffer: PositiveInt = 1024
    """Of a stream: the next row is drawn from so many."""
    prompt: str = "prompt"
    """Field of the prompt's text."""
    format: str | None = None
    """Text of the prompt in place of one field: "{document}\\n\\n{question}" takes two fields of the row."""
    answer: str | None = "answer"
    """Field of the reference answer: SFT's target, and what rewards compare with (null: rows have none)."""
    messages: str | None = None
    """Field of a conversation, a list of {role, content}, in place of prompt and answer: what the assistant says last
    is the answer, and all before it the prompt (implies chat)."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template, as what a user says."""
    system: str | None = None
    """With chat: what the system says first."""
    thinking: bool | None = None
    """With chat: the template's enable_thinking (null: as the template has it)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that lacks a field, or has no text in it, ends the run before it starts, or is skipped and counted."""
    retries: NonNegativeInt = 5
    """How often a read that fails (a network file system, the hub) is tried again, after 1, 2, 4, ... up to 60 s."""
    timeout_s: PositiveFloat = 300.0
    """A read that hangs for so long ends the run; the other ranks wait for as long as collective_timeout_s says."""
    teacher: str | None = None
    """Of a dgrpo stage with several teachers: field of the name of the teacher (of its model) that scores the row's
    responses."""
    share: PositiveFloat = 1.0
    """Of a mixture: this source's part of the tokens, relative to the others' parts."""

    @property
    def where(self) -> str:
        return self.path or f"{self.hub}{f'/{self.subset}' if self.subset else ''}"

    @property
    def name(self) -> str:
        """What its rows' names begin with."""
        return Path(self.path).name if self.path else self.where

    @property
    def is_chat(self) -> bool:
        return self.chat or self.messages is not None

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """Fields that must have text, for the prompt."""
        if self.messages is not None:
            return ()
        return tuple(dict.fromkeys(format_fields(self.format))) if self.format is not None else (self.prompt,)

    @property
    def text_fields(self) -> tuple[str, ...]:
        answer = () if self.messages is not None or self.answer is None else (self.answer,)
        teacher = () if self.teacher is None else (self.teacher,)
        return tuple(dict.fromkeys((*self.prompt_fields, *answer, *teacher)))


class Dataset(Source):
    """One source of rows, or a mixture of several."""

    mixture: tuple[Source, ...] = ()
    """Several sources in place of one. After any number of rows each has had its share of the tokens, to within a row
    of every source."""

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.mixture or (self,)


def format_fields(text: str) -> list[str]:
    """Names in braces; raises ValueError where they are more than names."""
    names = []
    for _, name, conversion_format, conversion in string.Formatter().parse(text):
        if name is None:
            continue
        if not name or conversion or conversion_format or any(c in name for c in ".[]") or name.isdecimal():
            raise ValueError(f"{{{name}}}: braces hold the name of a field and nothing else; write {{{{ for a brace")
        names.append(name)
    return names


def problems(where: str, dataset: Dataset, *, needs_answer: bool = False) -> Iterator[str]:
    """What is contradictory in a data section; each sentence begins with the dotted path."""
    if dataset.mixture:
        set_here = sorted(dataset.model_fields_set - {"mixture"})
        if set_here:
            yield f"{where}.mixture: {', '.join(set_here)} beside it belong to no source; move them into the mixture's"
        if len(dataset.mixture) == 1:
            yield f"{where}.mixture: has one source; write its keys under {where} itself, or add another"
    for number, source in enumerate(dataset.sources):
        path = f"{where}.mixture.{number}" if dataset.mixture else where
        yield from (f"{path}{problem}" for problem in _source_problems(source, needs_answer))


def _source_problems(source: Source, needs_answer: bool) -> Iterator[str]:
    if (source.path is None) == (source.hub is None):
        both = "path and hub name two places; keep one" if source.path is not None else "names no place"
        yield f": {both}" + ("" if source.path is not None else "; give a path, a hub name or a mixture")
    if source.hub is None and (source.subset is not None or source.revision is not None):
        yield ": subset and revision belong to a dataset on the hub; remove them"
    if source.format is not None:
        try:
            if not format_fields(source.format):
                yield ".format: names no field in braces, so that all prompts would be one; write {prompt} for example"
        except ValueError as error:
            yield f".format: {error}"
        if "prompt" in source.model_fields_set:
            yield ".format: prompt names a field, too; keep one of the two"
    if source.messages is not None and source.model_fields_set & {"prompt", "format", "answer"}:
        yield ".messages: the conversation has prompt and answer; remove prompt, format and answer"
    if not source.is_chat and (source.system is not None or source.thinking is not None):
        yield ".chat: system and thinking are parts of a chat template; set chat=true, or remove them"
    if needs_answer and source.messages is None and source.answer is None:
        yield ".answer: null, and this stage learns from answers; name their field"

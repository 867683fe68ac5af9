"""Constraints on a response that a program can check, as the `instructions` reward and a row's field list them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from megatron_dgrpo.config.frozen import Frozen

Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class Length(Frozen):
    """How long the response is."""

    kind: Literal["length"]
    unit: Literal["words", "characters", "sentences", "paragraphs", "lines"] = "words"
    """Paragraphs stand between empty lines; lines that are empty do not count."""
    at_least: NonNegativeInt = 0
    """Of the unit."""
    at_most: NonNegativeInt | None = None
    """No limit where none is given."""


class Keywords(Frozen):
    """Words or phrases that the response has, or has not, as whole words in any case."""

    kind: Literal["keywords"]
    words: Texts
    """Each is looked for by itself."""
    at_least: NonNegativeInt = 1
    """How often each must stand there."""
    at_most: NonNegativeInt | None = None
    """How often each may; 0 forbids them (then at_least is 0, too)."""


class Format(Frozen):
    """The form of the whole response."""

    kind: Literal["format"]
    form: Literal["json", "bullets", "numbered", "title", "quoted", "upper", "lower", "no_commas", "plain"]
    """json: an object or a list. bullets, numbered: every line but empty ones is an item. title: the first line is
    <<title>> or a Markdown heading. quoted: in double quotes. upper, lower: no letter of the other case. plain: no
    Markdown headings, emphasis, fences or tables."""


class Bullets(Frozen):
    """How many items of a list the response has."""

    kind: Literal["bullets"]
    at_least: NonNegativeInt = 1
    """Lines that begin as an item of a list does, with a sign or a number."""
    at_most: NonNegativeInt | None = None
    """No limit where none is given."""


class Ends(Frozen):
    """How the response begins and ends, white space apart."""

    kind: Literal["ends"]
    starts_with: str = ""
    """The first characters."""
    ends_with: str = ""
    """The last characters."""


class Language(Frozen):
    """The language of the response: by script, and for those written in Latin letters by their most frequent words."""

    kind: Literal["language"]
    language: Literal[
        "en", "de", "fr", "es", "it", "pt", "nl", "ru", "el", "ar", "he", "hi", "th", "ko", "ja", "zh"
    ]  # fmt: skip
    """Its ISO 639 code. ru stands for any language in Cyrillic letters, ar, he and hi likewise for their scripts."""


Constraint = Length | Keywords | Format | Bullets | Ends | Language

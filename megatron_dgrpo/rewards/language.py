"""A simple detector of languages, for constraints such as "answer in German".

Letters are counted by script. Where most are of a script that the table gives to one language, that is the answer;
Han characters are Japanese where kana stands between them, else Chinese. Among Latin letters the language with the
most of its frequent words decides, where at least one word in twelve is such a word and no other language has as many.
It tells the languages listed in `config.constraints.Language` apart in texts of a sentence or more; it knows nothing
of others, and takes Ukrainian for Russian.
"""

from __future__ import annotations

import re
from collections import Counter

_SCRIPTS = (
    ("ja", 0x3040, 0x30FF), ("zh", 0x3400, 0x9FFF), ("ko", 0xAC00, 0xD7AF), ("ko", 0x1100, 0x11FF),
    ("ru", 0x0400, 0x052F), ("el", 0x0370, 0x03FF), ("ar", 0x0600, 0x06FF), ("he", 0x0590, 0x05FF),
    ("hi", 0x0900, 0x097F), ("th", 0x0E00, 0x0E7F),
)  # fmt: skip
_FREQUENT = {
    "en": "the of and to in is that it for was are with as be this by not have from or an which you were they their",
    "de": "der die das und ist nicht ein eine zu den mit von auf für im sich auch dem des werden wird sind ich als war",
    "fr": "le la les et est des une du que qui dans pour pas sur au avec ce il elle sont nous vous par plus était",
    "es": "el la los las y es que en una un por con para del se no su lo como más pero son está este al",
    "it": "il la che di è un una per non con del della sono gli le si nel anche come ma più questo alla ha i",
    "pt": "o a os as e é que do da em um uma para com não no na por mais dos das se ao são foi",
    "nl": "de het een en van is dat niet op te zijn voor met die aan er maar ook als bij door naar wordt deze was",
}
_WORDS = {language: frozenset(words.split()) for language, words in _FREQUENT.items()}
_LEAST = 1 / 12


def language_of(text: str) -> str | None:
    """The ISO 639 code, or None where it cannot be told."""
    letters = Counter(_script(ord(letter)) for letter in text if letter.isalpha())
    if not letters:
        return None
    if letters["ja"] and 10 * letters["ja"] >= letters["zh"]:
        letters["ja"] += letters.pop("zh", 0)
    (script, most), total = letters.most_common(1)[0], letters.total()
    if 2 * most <= total:
        return None
    if script == "other":
        return None
    return script if script != "latin" else _latin(text)


def _script(point: int) -> str:
    return next(
        (name for name, first, last in _SCRIPTS if first <= point <= last), "latin" if point < 0x250 else "other"
    )


def _latin(text: str) -> str | None:
    words = re.findall(r"[^\W\d_]+", text.lower())
    found = Counter({language: sum(word in known for word in words) for language, known in _WORDS.items()})
    (first, count), (_, second) = found.most_common(2)
    return first if count > second and count >= max(1, _LEAST * len(words)) else None

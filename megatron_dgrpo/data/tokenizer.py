"""Text to token ids and back, by the tokenizer of a Hugging Face folder.

Three things that tokenizers do unasked are said here, once:

- The text of a prompt or an answer is plain text. A document that contains "<|endoftext|>" contains those characters,
  not the token that ends a sequence: special tokens are split like any other text. (Added tokens that a tokenizer
  itself calls not special, such as Qwen3's "<think>", stay one token.)
- A prompt starts with the BOS token if the tokenizer puts one there itself, and with nothing else; nothing is appended.
- Engines sample over the model's whole vocabulary, which may be larger than the tokenizer's. Ids without a token decode
  to the replacement character, never to nothing: a reward must not take them for a clean answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_dgrpo.errors import DataError

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
_NO_TOKEN = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Use `Tokenizer.load`."""

    def __init__(self, folder: Path, fast: Any) -> None:
        self.folder = folder
        self._fast = fast
        self._backend = fast.backend_tokenizer
        start = fast("", add_special_tokens=True)["input_ids"][:1]
        self.bos_id: int | None = fast.bos_token_id
        self.prefix: tuple[int, ...] = tuple(start) if start == [self.bos_id] else ()
        """What stands before the text of every prompt."""
        self.eos_ids = self._find_eos_ids()
        """Any of these ends a response. The first is what supervised answers end with."""
        self._special = frozenset(fast.all_special_ids) - {fast.unk_token_id}
        self._special_strings = {t.content: i for i, t in fast.added_tokens_decoder.items() if t.special}
        self.num_ids = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        """One more than the largest id: a model's vocabulary must have at least so many rows."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The tokenizer of a model folder; files only, no code of the folder's is run."""
        folder = Path(folder)
        if not any((folder / name).exists() for name in _FILES):
            raise DataError(
                f"{folder} has no tokenizer ({', '.join(_FILES)}): copy the tokenizer's files next to the weights"
            )
        from transformers import AutoTokenizer

        try:
            fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever its parsers raise: the Rust part has no exception class of its own
            raise DataError(f"the tokenizer in {folder} can't be loaded ({error}): copy its files again") from error
        if not fast.is_fast or not fast.backend_tokenizer.get_vocab(with_added_tokens=False):
            raise DataError(
                f"the tokenizer in {folder} has no usable tokenizer.json: convert it to one with transformers"
            )
        return cls(folder, fast)

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, with nothing before or behind."""
        try:
            ids = self._fast(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        except Exception as error:  # as above
            raise DataError(f"the tokenizer in {self.folder} can't encode {_shown(text)} ({error})") from error
        if leaked := self._special.intersection(ids):
            names = ", ".join(self._fast.convert_ids_to_tokens(sorted(leaked)))
            raise DataError(
                f"the tokenizer in {self.folder} makes special tokens ({names}) of the plain text {_shown(text)}"
            )
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        return [*self.prefix, *self.encode(text)]

    @property
    def special_strings(self) -> dict[str, int]:
        """The text of every special token, as templates write it, and its id."""
        return dict(self._special_strings)

    def render_chat(self, conversation: list[dict[str, str]], settings: dict[str, Any]) -> str:
        """A conversation as the folder's chat template has it, up to where the assistant's words begin."""
        if not self._fast.chat_template:
            raise DataError(
                f"the tokenizer in {self.folder} has no chat template: copy chat_template.jinja of the model it comes "
                "from, or set chat=false"
            )
        try:
            return self._fast.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **settings)
        except Exception as error:  # a template's own words, or jinja's about a broken one
            raise DataError(f"the chat template in {self.folder} can't render a conversation ({error})") from error

    def encode_template(self, text: str) -> list[int]:
        """The ids of what a template has rendered: its special tokens are special."""
        return self._fast(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of a response: the token that ended it left out, any other special token shown as it is written."""
        ids = [int(token) for token in tokens]
        if ids and ids[-1] in self.eos_ids:
            ids.pop()
        runs: list[list[int]] = [[]]
        for token in ids:
            if self._backend.id_to_token(token) is None:
                runs.append([])
            else:
                runs[-1].append(token)
        return _NO_TOKEN.join(map(self._text, runs))

    def _text(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""

    def _find_eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's own first, then those of generation_config.json (of config.json where there is none)."""
        found: list[int] = [] if self._fast.eos_token_id is None else [self._fast.eos_token_id]
        for name in ("generation_config.json", "config.json"):
            if (self.folder / name).exists():
                found += _eos_of(self.folder / name)
                break
        if not found:
            raise DataError(
                f"neither the tokenizer nor generation_config.json in {self.folder} names a token that ends a "
                "sequence: set eos_token in tokenizer_config.json"
            )
        return tuple(dict.fromkeys(found))

    def describe(self) -> dict[str, Any]:
        """What makes two tokenizers the same or not (`compatibility.py`)."""
        parts = json.loads(self._backend.to_str())
        added = {t["id"]: (t["content"], t["special"]) for t in parts["added_tokens"]}
        model = parts["model"]
        return {
            "vocabulary": self._backend.get_vocab(with_added_tokens=True),
            "added": added,
            "merges": model.get("merges"),
            "stages": {"model type": model.get("type"), "normalizer": parts["normalizer"],
                       "pre-tokenizer": parts["pre_tokenizer"]},
            "roles": {"prompt prefix": self.prefix, "eos token": self.eos_id},
        }  # fmt: skip


def _eos_of(path: Path) -> Iterable[int]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object ({error}): copy the folder again") from None
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) for v in values):
        raise DataError(f"eos_token_id in {path} is {value!r}: it must be an id or a list of ids")
    return values


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

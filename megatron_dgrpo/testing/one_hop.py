"""One-hop retrieval: a task that models with 80 thousand weights learn in seconds.

    k3v5 k11v0 k7v2 k0v5 k7   ->   v2

Each record is *one token* for a pair of a key and a value, the question is a key, and the answer is the value of its
record. Keys differ within a prompt, values need not. With a token for the key and another for the value the same task
takes an induction circuit, which tiny models don't find in any time a test could wait.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_dgrpo.errors import DataError
from megatron_dgrpo.testing.tiny import save_tokenizer


@dataclass(frozen=True)
class OneHop:
    """How many keys and values there are, and how many records a prompt has (least, most)."""

    keys: int = 16
    values: int = 8
    records: tuple[int, int] = (4, 8)

    def __post_init__(self) -> None:
        if not 1 <= self.records[0] <= self.records[1] <= self.keys:
            raise DataError(
                f"records={self.records} must be two numbers in order, from 1 to keys={self.keys}: keys differ"
            )

    @property
    def tokens(self) -> list[str]:
        """Every word of the task, in the order of their ids: records, keys, values."""
        keys, values = [f"k{k}" for k in range(self.keys)], [f"v{v}" for v in range(self.values)]
        return [*(key + value for key in keys for value in values), *keys, *values]

    @property
    def num_prompts(self) -> int:
        """How many different ones there are."""
        least, most = self.records
        return sum(math.perm(self.keys, n) * self.values**n * n for n in range(least, most + 1))

    def examples(self, seed: int) -> Iterator[tuple[str, str]]:
        """Different prompts with their answers, without end (almost)."""
        draw, seen = random.Random(seed), set[str]()
        while len(seen) < self.num_prompts:
            records = [
                (k, draw.randrange(self.values)) for k in draw.sample(range(self.keys), draw.randint(*self.records))
            ]
            key, value = draw.choice(records)
            prompt = " ".join([*(f"k{k}v{v}" for k, v in records), f"k{key}"])
            if prompt not in seen:
                seen.add(prompt)
                yield prompt, f"v{value}"


@dataclass(frozen=True)
class OneHopFiles:
    train: Path
    heldout: Path
    vocab_size: int
    """Of a model with the tokenizer that was written."""
    special_ids: tuple[int, int, int]
    """Of BOS, EOS and padding."""


def write_one_hop(
    folder: str | Path, *, num_train: int, num_heldout: int, task: OneHop | None = None, seed: int = 0
) -> OneHopFiles:
    """A tokenizer, train.jsonl and heldout.jsonl in a folder. No prompt is in both files, or twice in one."""
    task, folder = task or OneHop(), Path(folder)
    if num_train + num_heldout > task.num_prompts // 2:
        raise DataError(
            f"{num_train + num_heldout} different prompts are too many of {task.num_prompts}: "
            "take more keys, values or records"
        )
    folder.mkdir(parents=True, exist_ok=True)
    special_ids = save_tokenizer(folder, task.tokens)
    examples = task.examples(seed)
    for name, count in (("heldout", num_heldout), ("train", num_train)):
        lines = (json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in islice(examples, count))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return OneHopFiles(folder / "train.jsonl", folder / "heldout.jsonl", len(task.tokens) + 3, special_ids)

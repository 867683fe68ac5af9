"""How a stage takes its rows, and how many steps so many epochs of them are."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_dgrpo.config.schema import Config, Stage, Static
from megatron_dgrpo.data.chat import prompt_ids
from megatron_dgrpo.data.dataset import PromptSource, Rows
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.observe.progress import Board

_COUNT_S = 3600.0
"""What the other ranks allow rank 0 for tokenising the data once."""


def prompt_source(stage: Stage, tokenizer: Tokenizer, *, seed: int) -> PromptSource:
    """A stage's rows, in the order in which it takes them. Where tokens count (in mixtures, and in batches of so many
    tokens), a row counts with those of its prompt and of the answer that is learnt."""
    learns = isinstance(stage, Static)
    by_tokens = bool(stage.data.mixture) or (isinstance(stage, Static) and stage.batch_tokens is not None)
    count = _counter(tokenizer, learns=learns) if by_tokens else lambda row: 1
    return PromptSource(stage.data, seed=seed, num_tokens=count, needs_answer=learns)


def _counter(tokenizer: Tokenizer, *, learns: bool) -> Callable[[PromptRow], int]:
    return lambda row: len(prompt_ids(tokenizer, row)) + (len(tokenizer.encode(row.answer)) + 1 if learns else 0)


def with_steps(config: Config, store: dist.Store) -> Config:
    """The config with numbers of steps where it has numbers of epochs. Rank 0 counts; the others wait for it."""
    stages = list(config.stages)
    for number, stage in enumerate(stages):
        if isinstance(stage, Static) and stage.epochs is not None:
            key = f"steps/{number}"
            if dist.get_rank() == 0:
                tokenizer = Tokenizer.load(config.models[config.student].path)
                store.set(key, str(num_steps(stage, tokenizer, seed=config.seed + number)))
            store.wait([key], timedelta(seconds=_COUNT_S))
            stages[number] = stage.model_copy(update={"steps": int(store.get(key))})
    return config.model_copy(update={"stages": tuple(stages)})


def num_steps(stage: Static, tokenizer: Tokenizer, *, seed: int) -> int:
    """Steps until the stage has taken each row so often; the last one goes on into the next epoch where it must."""
    assert stage.epochs is not None
    num_rows = len(Rows(stage.data, needs_answer=True))
    wanted = math.ceil(round(stage.epochs * num_rows, 6))
    if stage.batch_size is not None:
        return math.ceil(wanted / stage.batch_size)
    assert stage.batch_tokens is not None
    counted: dict[str, int] = {}
    count = _counter(tokenizer, learns=True)

    def once(row: PromptRow) -> int:
        name = row.name.rpartition("@")[0]  # the row's in its epoch
        if name not in counted:
            counted[name] = count(row)
        return counted[name]

    rows = PromptSource(stage.data, seed=seed, num_tokens=once, needs_answer=True)
    steps = taken = 0
    with Board().task("count the tokens of the data", wanted, "rows") as task:
        while taken < wanted:
            batch = len(rows.take_tokens(stage.batch_tokens))
            steps, taken = steps + 1, taken + batch
            task.advance(batch)
    return steps

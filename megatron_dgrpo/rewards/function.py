"""A function of the user's, imported in the worker: what it does to its process, it does not do to the trainer's."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Sample


class Function:
    def __init__(self, config: settings.Function) -> None:
        module, _, name = config.function.partition(":")
        try:
            self._function = getattr(importlib.import_module(module), name)
        except Exception as error:
            raise RewardError(
                f"{config.function} can't be imported ({error!r}); put it into PYTHONPATH or the current folder"
            ) from error
        if inspect.iscoroutinefunction(self._function):
            raise RewardError(f"{config.function} is asynchronous; give a plain function (it may call asyncio.run)")
        try:
            inspect.signature(self._function).bind("", answer="", prompt="", fields={})
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{config.function} can't be called as function(text, answer=..., prompt=..., fields=...): {error}"
            ) from None

    def score(self, sample: Sample) -> Any:
        return self._function(
            sample.text, answer=sample.answer, prompt=sample.prompt, fields=dict(sample.fields)
        )  # the worker looks at what it gave

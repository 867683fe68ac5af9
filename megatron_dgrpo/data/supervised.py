"""Supervised examples: a prompt, then the answer and its end as the one trained segment.

Prompt and answer are tokenised apart, as they are when an engine continues the prompt: the answer's first token is one
that the model can be asked for. The end-of-sequence token is part of the answer and is trained on.
"""

from __future__ import annotations

import numpy as np

from megatron_dgrpo.data.chat import prompt_ids
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.packing.trajectory import Segment, Trajectory


def example(row: PromptRow, tokenizer: Tokenizer) -> Trajectory:
    prompt = prompt_ids(tokenizer, row)
    if not prompt:
        raise DataError(f"{row.name}: the prompt has no tokens, and the answer's first token needs one before it")
    answer = np.asarray([*tokenizer.encode(row.answer), tokenizer.eos_id], np.int32)
    return Trajectory(
        prompt_id=row.name, sample=0, prompt_tokens=np.asarray(prompt, np.int32),
        segments=(Segment(answer, trained=True),), finish_reason="stop",
    )  # fmt: skip

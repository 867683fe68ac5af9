from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.data.supervised import example
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trees import documents
from megatron_dgrpo.testing.tiny import save_tokenizer


def test_the_answer_and_its_end_are_trained(tmp_path: Path) -> None:
    bos, eos, _ = save_tokenizer(tmp_path, ["a", "b", "c"])
    made = example(PromptRow("d:1", "a b", "c a"), Tokenizer.load(tmp_path))
    assert made.prompt_id == "d:1" and made.num_loss_tokens == 3
    np.testing.assert_array_equal(made.prompt_tokens, [bos, 0, 1])
    np.testing.assert_array_equal(made.response_tokens, [2, 0, eos])
    (layout,) = Packing(16).micro_batches(documents([made]))
    np.testing.assert_array_equal(layout.tokens_S, [bos, 0, 1, 2, 0, eos])
    np.testing.assert_array_equal(layout.row_target_R, [2, 0, eos])
    np.testing.assert_array_equal(layout.row_hidden_R, [2, 3, 4])


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, ["a"], starts_with_bos=False)
    with pytest.raises(DataError, match="d:7: the prompt has no tokens"):
        example(PromptRow("d:7", "  ", "a"), Tokenizer.load(tmp_path))

from __future__ import annotations

import json
from pathlib import Path

from megatron_dgrpo.checkpoint.hf.beside import copy_beside
from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.rope import YarnRope
from megatron_dgrpo.testing.tiny import save_tiny


def test_a_config_says_which_rotary_embeddings_the_weights_were_trained_with(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", vocab_size=96, max_positions=64)
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
    copy_beside(source, own, "bfloat16", read_spec(source))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, own))
    assert after == before | {"dtype": "bfloat16"}

    stretched = read_spec(source, YarnRope(kind="yarn", factor=4, original_max_positions=64))
    copy_beside(source, other, "bfloat16", stretched)
    assert read_spec(other) == stretched
    assert json.loads((other / "config.json").read_text())["max_position_embeddings"] == 256

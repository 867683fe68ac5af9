"""Rewards that are written wrongly: everything is said at once, with the nearest key or kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import ConfigError

BAD = """
run_dir: runs/first
student: small
models:
  small: {path: models/small, dtype: float32}
engines:
  main: {model: small, max_model_len: 512}
stages:
  - kind: dgrpo
    data: {path: data/train.jsonl}
    steps: 10
    optimizer: {lr: 1e-3}
    engine: main
    prompts_per_step: 8
    group_size: 4
    sampling: {max_tokens: 8}
    rewards:
      - {kind: exact_macth}
      - {kind: judge, url: localhost, model: m}
      - {kind: code, on_failure: zeor, timeout: 3}
      - {kind: instructions, constraints: [{kind: length, at_mots: 3}, {kind: lenght}]}
      - {kind: function, function: foo}
      - {kind: token_f1, name: "a/b"}
"""


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    with pytest.raises(ConfigError) as caught:
        load(path)
    _, *found = str(caught.value).splitlines()
    wanted = [
        ("0", "did you mean 'exact_match'?"),
        ("1.url", "http://HOST:8000/v1"),
        ("2.on_failure", "did you mean 'zero'?"),
        ("2.timeout", "did you mean 'timeout_s'?"),
        ("3.constraints.0.at_mots", "did you mean 'at_most'?"),
        ("3.constraints.1", "did you mean 'length'?"),
        ("4.function", "module:function"),
        ("5.name", "'a/b' string should match pattern"),
    ]
    assert len(found) == len(wanted)
    for line, (where, words) in zip(found, wanted, strict=True):
        assert line.startswith(f"  - stages.0.rewards.{where}: ") and words in line

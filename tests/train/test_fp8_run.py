"""A run whose engine is in FP8: it samples from another model than the one that is trained, and the figures say so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_loop import _config, _write

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.testing.one_hop import write_one_hop
from megatron_dgrpo.testing.tiny import save_tiny_qwen3


def test_a_run_with_an_fp8_engine(files: Path, tmp_path: Path) -> None:
    task = write_one_hop(tmp_path / "task", num_train=8, num_heldout=8, seed=0)  # for its vocabulary
    student = save_tiny_qwen3(
        tmp_path / "student", vocab_size=task.vocab_size, special_ids=task.special_ids,
        hidden=128, heads=4, kv_heads=2, head_dim=64, intermediate=256,
    )  # fmt: skip
    for tokenizer in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(files / "student" / tokenizer, student / tokenizer)
    config = _config(files, tmp_path / "run")
    config["models"]["student"]["path"] = str(student)
    config["stages"] = [config["stages"][1] | {"steps": 2}]
    engine = config["engines"]["rollout"]
    engine |= {"quantization": "fp8", "dtype": "bfloat16", "checksums": True}
    config["stages"][0]["objective"]["correction"] = {"kind": "truncated"}
    assert train(load(_write(tmp_path, config))) == 0
    updates = [r for r in read_metrics(tmp_path / "run/metrics.jsonl").records if "update" in r]
    assert [(r["step"], r["update"]) for r in updates] == [(s, u) for s in (1, 2) for u in (1, 2)]
    for record in updates:
        assert 1e-3 < record["mismatch/max"] and record["mismatch/abs"] < 0.1
    narrow = _config(files, tmp_path / "narrow")
    narrow["engines"]["rollout"] = engine
    with pytest.raises(ConfigError, match="engines.rollout.quantization: a hidden size of 64 is not cut into whole"):
        train(load(_write(tmp_path, narrow)))

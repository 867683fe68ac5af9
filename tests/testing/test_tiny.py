from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.testing.one_hop import OneHop, write_one_hop
from megatron_dgrpo.testing.tiny import save_tiny_qwen3, save_tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_transformers_loads_what_was_saved(tmp_path: Path, tied: bool, dtype: str) -> None:
    save_tiny_qwen3(
        tmp_path, vocab_size=37, hidden=96, layers=3, heads=4, kv_heads=2, intermediate=80, tied=tied, dtype=dtype,
        rope_theta=1e6, special_ids=(34, 35, 36),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == getattr(torch, dtype) and model.config.rope_parameters["rope_theta"] == 1e6
    assert model.config.head_dim == 32 and model.lm_head.weight.shape == (37, 96)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert model.generation_config.eos_token_id == 35 and model.generation_config.pad_token_id == 36
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    spec = read_spec(tmp_path)
    assert (spec.num_layers, spec.num_kv_heads, spec.ffn_size, spec.vocab_size, spec.tied) == (3, 2, 80, 37, tied)


def test_weights_follow_from_the_seed_and_nothing_else(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    save_tiny_qwen3(tmp_path / "a", vocab_size=20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"
    torch.manual_seed(5)
    save_tiny_qwen3(tmp_path / "b", vocab_size=20, seed=1)
    save_tiny_qwen3(tmp_path / "c", vocab_size=20, seed=2)
    save_tiny_qwen3(tmp_path / "d", vocab_size=20, seed=1, tied=False)
    a, b, c, d = (load_file(tmp_path / name / "model.safetensors") for name in "abcd")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert all(torch.equal(a[name], d[name]) for name in a) and d.keys() - a.keys() == {"lm_head.weight"}
    assert a["model.embed_tokens.weight"].std().item() == pytest.approx(0.05, rel=0.1)


def test_norms_and_shards(tmp_path: Path) -> None:
    save_tiny_qwen3(tmp_path / "plain", vocab_size=20)
    save_tiny_qwen3(tmp_path / "cut", vocab_size=20, random_norms=True, max_shard_bytes=60_000)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and index.keys() == plain.keys()
    norms = [name for name in plain if "norm" in name]
    assert len(norms) == 2 * 4 + 1
    for name in norms:
        assert (plain[name] == 1).all()
        cut = load_file(tmp_path / "cut" / index[name])[name]
        assert cut.std() > 0.05 and cut.min() > 0


def test_a_tokenizer_of_words(tmp_path: Path) -> None:
    save_tiny_qwen3(tmp_path, vocab_size=6, special_ids=(3, 4, 5))
    assert save_tokenizer(tmp_path, ["one", "two", "three"]) == (3, 4, 5)
    reference = AutoTokenizer.from_pretrained(tmp_path)  # finds the tokenizer's own class next to a Qwen3 config
    assert reference("two one")["input_ids"] == [3, 1, 0] and reference.chat_template is None
    assert reference.decode([1, 2]) == "two three"
    assert Tokenizer.load(tmp_path).eos_ids == (4,)


def test_one_hop_answers_are_right_and_files_are_apart(tmp_path: Path) -> None:
    files = write_one_hop(tmp_path, num_train=300, num_heldout=100, seed=3)
    tokenizer = Tokenizer.load(tmp_path)
    assert files.vocab_size == tokenizer.num_ids == 16 * 8 + 16 + 8 + 3
    rows = {path: [json.loads(line) for line in path.read_text().splitlines()] for path in (files.train, files.heldout)}
    assert [len(r) for r in rows.values()] == [300, 100]
    everything = [row for part in rows.values() for row in part]
    assert len({row["prompt"] for row in everything}) == 400
    lengths = set()
    for row in everything:
        *records, query = row["prompt"].split()
        pairs = dict(record[1:].split("v") for record in records)
        assert len(pairs) == len(records), "keys differ"
        assert row["answer"] == f"v{pairs[query[1:]]}"
        assert len(tokenizer.encode_prompt(row["prompt"])) == len(records) + 2
        assert len(tokenizer.encode(row["answer"])) == 1
        lengths.add(len(records))
    assert lengths == {4, 5, 6, 7, 8}
    assert len({row["answer"] for row in everything}) == 8


def test_one_hop_is_repeatable(tmp_path: Path) -> None:
    a, b, c = (
        write_one_hop(tmp_path / name, num_train=50, num_heldout=20, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a.train.read_bytes() == b.train.read_bytes() and a.heldout.read_bytes() == b.heldout.read_bytes()
    assert a.train.read_bytes() != c.train.read_bytes()


def test_one_hop_with_too_few_prompts(tmp_path: Path) -> None:
    task = OneHop(keys=2, values=2, records=(1, 2))
    assert task.num_prompts == 2 * 2 * 1 + 2 * 4 * 2 == len(list(task.examples(0)))
    with pytest.raises(DataError, match="too many of 20"):
        write_one_hop(tmp_path, num_train=10, num_heldout=1, task=task)
    with pytest.raises(DataError, match="keys=2"):
        OneHop(keys=2, records=(1, 3))

"""Megatron's distributed checkpoints: saved at one layout, loaded at another, bit for bit; broken ones are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.distributed import RankError
from megatron_dgrpo.testing.gradients import pieces, whole
from megatron_dgrpo.testing.tiny import save_tiny_qwen3, save_tokenizer

WORDS = [f"w{i}" for i in range(60)]


def model_folder(folder: Path, *, vocab: int = 97, tied: bool = False, dtype: str = "float32", layers: int = 2) -> Path:
    save_tiny_qwen3(
        folder, vocab_size=vocab, tied=tied, heads=4, kv_heads=2, dtype=dtype, random_norms=True, layers=layers,
        special_ids=save_tokenizer(folder, WORDS), std=0.3,
    )  # fmt: skip
    return folder


def decoder_of(spec: Any, world: int, tp: int, dtype: str) -> Any:
    from megatron_dgrpo.model.decoder import build_decoder
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.parallel.groups import Groups

    decoder = build_decoder(
        spec, groups=Groups(tp=tp, dp=world // tp), options=BuildOptions(dtype=getattr(torch, dtype))
    )
    for parameter in decoder.parameters():
        parameter.data.fill_(float("nan"))
    return decoder


def save(rank: int, world: int, source: str, target: str, tp: int, dtype: str) -> list[Any]:
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.checkpoint.hf.importer import import_weights
    from megatron_dgrpo.checkpoint.megatron import save_megatron

    decoder = decoder_of(read_spec(source), world, tp, dtype)
    import_weights(decoder, source)
    save_megatron(decoder, source, target)
    return pieces(decoder, "data")


def load(rank: int, world: int, folder: str, tp: int, dtype: str) -> list[Any]:
    from megatron_dgrpo.checkpoint.megatron import load_megatron, read_about

    decoder = decoder_of(read_about(folder).spec, world, tp, dtype)
    load_megatron(decoder, folder)
    assert all(parameter.isfinite().all() for parameter in decoder.parameters()), "padding is not left as it was"
    return pieces(decoder, "data")


@pytest.mark.parametrize(("tied", "vocab"), [(True, 97), (False, 97), (False, 96)])
@pytest.mark.parametrize(
    ("world_1", "tp_1", "world_2", "tp_2"),
    [(4, 4, 4, 1), (4, 2, 4, 4), (4, 1, 4, 2), (1, 1, 4, 4), (4, 4, 1, 1), (2, 2, 2, 2)],
)
def test_save_at_one_layout_load_at_another(
    tmp_path: Path, tied: bool, vocab: int, world_1: int, tp_1: int, world_2: int, tp_2: int
) -> None:
    source = model_folder(tmp_path / "hf", tied=tied, vocab=vocab)
    saved = whole(run_distributed(save, world_1, str(source), str(tmp_path / "mcore"), tp_1, "float32"))
    loaded = whole(run_distributed(load, world_2, str(tmp_path / "mcore"), tp_2, "float32"))
    assert saved.keys() == loaded.keys() and len(saved) == 2 + 11 * 2 + (not tied)
    for name, tensor in saved.items():
        assert torch.equal(tensor, loaded[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_the_type_of_the_checkpoint_and_of_the_model_may_differ(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "hf")
    saved = whole(run_distributed(save, 2, str(source), str(tmp_path / "mcore"), 2, "bfloat16"))
    loaded = whole(run_distributed(load, 1, str(tmp_path / "mcore"), 1, "float32"))
    assert all(torch.equal(tensor.float(), loaded[name]) for name, tensor in saved.items())


def test_config_and_tokenizer_travel_with_the_weights(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "hf")
    run_distributed(save, 1, str(source), str(tmp_path / "mcore"), 1, "bfloat16")
    beside = tmp_path / "mcore" / "huggingface"
    assert json.loads((beside / "config.json").read_text())["dtype"] == "bfloat16"
    assert (beside / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    run_distributed(save, 2, str(model_folder(folder / "hf")), str(folder / "mcore"), 2, "float32")
    return folder / "mcore"


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch attacked",)


def _truncate(folder: Path) -> None:
    path = next((folder / "weights").glob("__1_0.distcp"))
    path.write_bytes(path.read_bytes()[:5000])


def _other_config(folder: Path) -> None:
    path = folder / "huggingface" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3, "num_hidden_layers": 3}))


def _format(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.json").unlink(), "no Megatron checkpoint of this project"),
        (lambda folder: (folder / "model.json").write_text("{"), "model.json is damaged"),
        (_format, "has the format 7, this version reads 1"),
        (_other_config, "(?s)not the config that the weights were saved with.*num_layers: 2, now 3.*norm_eps"),
        (lambda folder: (folder / "weights" / ".metadata").unlink(), "can't be read"),
        (lambda folder: (folder / "weights" / "metadata.json").unlink(), "can't be read"),
        (lambda folder: (folder / "weights" / "__1_0.distcp").unlink(), "can't be read.*__1_0.distcp"),
        (_truncate, "can't be read"),
        (lambda folder: (folder / "weights" / ".metadata").write_bytes(pickle.dumps(Attack())), "posix.system, which"),
    ],
)
def test_what_is_broken_is_named_on_every_rank(checkpoint: Path, tmp_path: Path, damage: Any, says: str) -> None:
    folder = tmp_path / "mcore"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(RankError, match=says) as caught:
        run_distributed(load, 2, str(folder), 2, "float32")
    assert "2 of 2 ranks failed" in str(caught.value) and "hung" not in str(caught.value)
    assert not (Path.cwd() / "attacked").exists()


def test_an_other_models_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Weights of three layers and a tied head under the config of two layers and an untied one."""
    source = model_folder(tmp_path / "hf", tied=True, layers=3)
    run_distributed(save, 1, str(source), str(tmp_path / "other"), 1, "float32")
    shutil.copytree(checkpoint, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "weights")
    shutil.copytree(tmp_path / "other" / "weights", tmp_path / "mixed" / "weights")
    with pytest.raises(RankError, match=r"(?s)layers.*shape \[3, .*the model's is \[2, .*output_layer.weight is miss"):
        run_distributed(load, 1, str(tmp_path / "mixed"), 1, "float32")


def test_the_place_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "hf")
    (tmp_path / "mcore").mkdir()
    with pytest.raises(RankError, match="exists already"):
        run_distributed(save, 2, str(source), str(tmp_path / "mcore"), 2, "float32")
    assert list((tmp_path / "mcore").iterdir()) == []

"""Every example passes a dry run, without weights and without a network: layouts and memory by the true config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.cli import main
from megatron_dgrpo.config.loader import load
from megatron_dgrpo.launch.dry_run import num_parameters

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
# What their authors call them, in billions of parameters.
MODELS = {
    "Qwen3-1.7B": 1.72, "Qwen3-4B": 4.02, "Qwen3-32B": 32.76, "Qwen3-30B-A3B": 30.53, "Llama-3.2-3B": 3.21,
    "Llama-3.1-8B": 8.03,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def dry_run(example: str, resolved: Path, *more: str) -> int:
    arguments = ["train", f"examples/{example}", *more, "--dry-run", "--resolved", str(resolved)]
    return main(arguments)


@pytest.mark.parametrize("example", [name for name in EXAMPLES if name != "demo.yaml"])
def test_an_example_passes_a_dry_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    before = {path.name for path in ROOT.iterdir()}
    assert dry_run(example, tmp_path / "resolved.yaml", "--device-memory", "80GiB") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    config = load(tmp_path / "resolved.yaml")
    assert config == load(ROOT / "examples" / example)
    for name in config.models:
        assert f"- models.{name}: weights and tokenizer, since {config.models[name].path} has config.json alone" in said
    for number, stage in enumerate(config.stages):
        assert f"stages.{number} ({stage.kind}), bytes on each rank:" in said
        for source in stage.data.sources:
            assert f"- stages.{number}.data: {source.where}" in said
    assert {path.name for path in ROOT.iterdir()} == before
    assert not Path(config.run_dir).exists()


def test_the_demo_is_what_dgrpo_demo_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_dgrpo.testing.distributed import run_forked
    from megatron_dgrpo.train.demo import dgrpo_config, write_config

    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    run_forked(_make_demo, str(tmp_path / "runs/demo"), 0)
    for name in ("student", "teacher"):
        shutil.copytree(f"runs/demo/{name}", f"runs/demo/runs/{name}/hf")
    out = Path("runs/demo")
    assert load("examples/demo.yaml") == load(write_config(out, "dgrpo", dgrpo_config(out, 0)))
    assert dry_run("demo.yaml", tmp_path / "resolved.yaml", "--device-memory", "1GiB") == 0, capsys.readouterr().err
    assert "Not checked: nothing" in capsys.readouterr().out
    assert not Path("runs/demo/runs/dgrpo").exists()


def _make_demo(folder: str, seed: int) -> None:
    from megatron_dgrpo.testing.one_hop_models import write_models

    write_models(Path(folder), seed)


def test_the_models_beside_the_examples_are_those() -> None:
    folders = sorted(path.name for path in (ROOT / "examples/models").iterdir() if path.is_dir())
    assert folders == sorted(MODELS)
    for name, billions in MODELS.items():
        spec = read_spec(ROOT / "examples/models" / name)
        assert num_parameters(spec) / 1e9 == pytest.approx(billions, abs=0.006), name
        settings: dict[str, Any] = json.loads((ROOT / "examples/models" / name / "config.json").read_text())
        assert spec.num_heads % spec.num_kv_heads == 0 and settings["torch_dtype"] == "bfloat16"


def test_every_example_says_what_it_is() -> None:
    for name in EXAMPLES:
        text = (ROOT / "examples" / name).read_text()
        assert text.startswith("# ") and f"examples/{name}" in text
        assert yaml.safe_load(text)["run_dir"].startswith("runs/")

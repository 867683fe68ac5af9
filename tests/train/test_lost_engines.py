"""`dgrpo train` with engines that are killed, that hang, that are somewhere else: the run goes on, or says why not."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_loop import _alive, _config, _descendants, _named, _some_groups, _wait, _write

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import ConfigError
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics

pytestmark = pytest.mark.long


def _long_batches(config: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """One dGRPO stage on two ranks whose batches take long enough to be caught in the middle."""
    stage = config["stages"][1] | {"steps": 3, "prompts_per_step": 8, "group_size": 8, "updates_per_batch": 1}
    config["engines"]["rollout"] |= {"max_num_seqs": 1, "hang_timeout_s": 4.0} | engine
    return config | {"stages": [stage]}


def _run(files: Path, folder: Path, number: int | None = None) -> list[dict[str, Any]]:
    """The figures of each update; with a number, the engine gets that signal while it works on the second batch."""
    folder.mkdir()
    config = _long_batches(_config(files, folder / "run"))
    metrics, done = folder / "run/metrics.jsonl", threading.Event()

    def lose() -> None:
        assert _some_groups(folder / "run", 2) < 8, "too late"
        (engine,) = _named(_descendants(os.getpid()), "engine-rollout")
        os.kill(engine, number or 0)
        done.set()

    thread = threading.Thread(target=lose)
    thread.start()
    assert train(load(_write(folder, config))) == 0
    thread.join()
    assert done.is_set(), "nothing was disturbed"
    return [r for r in read_metrics(metrics).records if "update" in r]


@pytest.fixture(scope="module")
def calm(files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _run(files, tmp_path_factory.mktemp("calm") / "run")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_goes_on_when_its_engine_is_lost_in_a_batch(
    files: Path, calm: list[dict[str, Any]], tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The figures of its steps are those of an undisturbed run: no sample is lost, none is there twice, and the engine
    that came back had the batch's weights, which both ranks gave it again."""
    disturbed = _run(files, tmp_path / "run", number)
    said = capfd.readouterr().out
    assert "engine-rollout is lost in the middle of a batch" in said and "it is started again" in said
    assert [r["step"] for r in disturbed] == [r["step"] for r in calm] == [1, 2, 3]
    for ours, theirs in zip(disturbed, calm, strict=True):
        assert ours["mismatch/max"] <= 1e-4
        for figure in ("reward/mean", "response/length", "tokens"):
            assert ours[figure] == pytest.approx(theirs[figure], abs=1e-6), figure
    assert not list(Path("/dev/shm").glob("dgrpo-*"))


# ---- engines at addresses ----


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Elsewhere:
    """An engine that somebody started by hand."""

    process: subprocess.Popen[str]
    address: str
    key_file: Path
    config: dict[str, Any]


@pytest.fixture(scope="module")
def elsewhere(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("elsewhere")
    key_file, address = folder / "key", f"tcp:127.0.0.1:{_free_port()}"
    key_file.write_text(secrets.token_hex(32) + "\n")
    key_file.chmod(0o600)
    config = _config(files, folder / "run")
    config["stages"] = config["stages"][1:2]
    command = [sys.executable, "-m", "megatron_dgrpo.cli", "engine", str(_write(folder, config)), "rollout"]
    command += ["--listen", address, "--key-file", str(key_file)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    config["engines"]["rollout"] |= {"addresses": [address], "key_file": str(key_file)}
    try:
        yield Elsewhere(process, address, key_file, config)
        print((folder / "log").read_text())
    finally:
        process.kill()
        process.wait()


def _said(folder: Path, config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        train(load(_write(folder, config)))
    assert not (folder / "run").exists()
    return str(caught.value)


def test_an_engine_that_is_not_the_one_needed_is_refused_before_anything_starts(
    files: Path, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    """Both sides are named, with all that differs between them; and the engine lives on."""
    config = elsewhere.config | {"run_dir": str(tmp_path / "run")}
    other = config["models"]["student"] | {"dtype": "bfloat16", "path": _other_model(files)}
    config["models"] = config["models"] | {"student": other}
    config["engines"] = {"rollout": config["engines"]["rollout"] | {"max_model_len": 48}}
    said = _said(tmp_path, config)
    assert (
        f"the engine at {elsewhere.address} samples over a vocabulary of " in said and "the run's student has" in said
    )
    assert "has a context of 32; the run needs engines.rollout.max_model_len=48" in said
    assert "computes in float32; the run's config says bfloat16" in said
    assert "a Qwen3ForCausalLM; the run's student is a Qwen2ForCausalLM" in said

    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    wrong.chmod(0o644)
    config = elsewhere.config | {"run_dir": str(tmp_path / "run")}
    config["engines"] = {"rollout": config["engines"]["rollout"] | {"key_file": str(wrong)}}
    assert f"{wrong} can be read by others (mode 0644); chmod 600" in _said(tmp_path, config)
    wrong.chmod(0o600)
    said = _said(tmp_path, config)
    assert f"{elsewhere.address} refused this run's key" in said and f"the same key as {wrong}" in said

    nowhere = f"tcp:127.0.0.1:{_free_port()}"
    config["engines"]["rollout"] |= {"addresses": [nowhere], "start_timeout_s": 1}
    said = _said(tmp_path, config)
    assert f"could not be reached at {nowhere} within 1 s" in said and f"--listen {nowhere}" in said
    assert elsewhere.process.poll() is None


def _other_model(files: Path) -> str:
    """The student's tokenizer beside another architecture and vocabulary."""
    import torch
    from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

    folder = files / "other"
    student = AutoConfig.from_pretrained(files / "student")
    torch.manual_seed(0)
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size")
    config = Qwen2Config(
        **{name: getattr(student, name) for name in sizes},
        vocab_size=student.vocab_size + 2,
        max_position_embeddings=64,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for path in (files / "student").glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return str(folder)


def test_an_engine_elsewhere_ends_with_a_trainer_that_is_killed(elsewhere: Elsewhere, tmp_path: Path) -> None:
    config = elsewhere.config | {"run_dir": str(tmp_path / "run")}
    config["stages"] = [config["stages"][0] | {"steps": 100_000}]
    command = [sys.executable, "-m", "megatron_dgrpo.cli", "train", str(_write(tmp_path, config))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    try:
        _wait(
            lambda: process.poll() is not None or (metrics.exists() and '"step": 2, "update"' in metrics.read_text()),
            180,
            "the run did not get to its second step",
        )
        assert process.poll() is None, process.stderr and process.stderr.read()
        family = _descendants(process.pid)
        assert not _named(family, "engine-rollout")
        assert max(r.get("mismatch/max", 0) for r in read_metrics(metrics).records) <= 1e-4
    finally:
        process.kill()
        process.wait()
    _wait(lambda: not _alive(family), 60, "processes are left")
    assert elsewhere.process.wait(60) == 0, "the engine ends with its last owner"

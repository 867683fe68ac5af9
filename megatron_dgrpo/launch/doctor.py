"""`dgrpo doctor`: what this machine has, what each missing part disables, and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_dgrpo.launch import parts
from megatron_dgrpo.launch.parts import INSTALL, Finding, library
from megatron_dgrpo.launch.probes import probe

_PROBES = {"torch": "torch", "megatron-core": "megatron", "transformer-engine": "transformer_engine"}


def examine(works: Sequence[str]) -> int:
    """Print all findings; 0 when everything that `works` need is there, else 1."""
    console = Console()
    with console.status("Importing torch and what builds on it") if console.is_terminal else contextlib.nullcontext():
        findings = diagnose()
    _print_table(console, findings, works) if console.is_terminal else _print_plain(findings, works)
    blocking = [finding.part for finding in findings if finding.blocks(works)]
    if blocking:
        print(f"Not ready for {' and '.join(works)}: {', '.join(blocking)}.")
        return 1
    print(f"Ready for {' and '.join(works)}.")
    return 0


def _print_plain(findings: Sequence[Finding], works: Sequence[str]) -> None:
    for finding in findings:
        print(f"{finding.label(works):8} {finding.part:20} {finding.found}")
    for finding in findings:
        if finding.disables:
            print(f"\n{finding.part}: {finding.found}")
            print(f"  disables: {finding.disables}")
            print(f"  remedy:   {finding.remedy}")
    print()


def _print_table(console: Console, findings: Sequence[Finding], works: Sequence[str]) -> None:
    styles = {"ok": "green", "limited": "yellow", "absent": "yellow", "MISSING": "bold red"}
    table = Table("", "part", "found", "disables", "remedy", title=f"For {' and '.join(works)}", title_justify="left")
    for finding in findings:
        label = finding.label(works)
        style = styles[label]
        cells = (finding.part, finding.found, finding.disables, finding.remedy)
        table.add_row(f"[{style}]{label}[/]", *map(escape, cells))
    console.print(table)


def diagnose() -> list[Finding]:
    """Every part, in the order in which they build on each other."""
    installed = [name for name in _PROBES if parts.version(name)]
    with ThreadPoolExecutor() as pool:
        answers = dict(zip(installed, pool.map(lambda name: probe(_PROBES[name]), installed), strict=True))
    torch = answers.get("torch", {})
    return [
        parts.python(),
        parts.cores_and_memory(),
        parts.shared_memory(),
        parts.compiler(),
        library("torch", ("train", "rollout"), "training and rollouts", INSTALL, torch),
        parts.cuda(torch),
        library("megatron-core", ("train",), "training", INSTALL, answers.get("megatron-core")),
        library("transformers", ("train", "rollout"), "reading models and tokenizers", INSTALL),
        library("tokenizers", ("train", "rollout"), "tokenizers", INSTALL),
        library("safetensors", ("train", "rollout"), "reading and writing weights", INSTALL),
        library("datasets", ("train",), "reading datasets", INSTALL),
        *parts.transformer_engine(answers.get("transformer-engine"), torch),
        parts.apex(),
        parts.vllm(bool(torch.get("devices"))),
        parts.nemo_run(),
        parts.slurm(),
    ]

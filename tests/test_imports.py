"""The dependency rules of the package, held over its source: layers, heavy imports, Megatron's globals, file length."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "megatron_dgrpo"
FILES = sorted(ROOT.rglob("*.py"))

# What each lower package may import of this project, beside itself, errors and points. Dependencies point downwards
# only: what is not in this table (evaluate, train, launch, testing, cli) sits above all of it.
BELOW: dict[str, set[str]] = {
    "config": set(),
    "points": set(),
    "packing": set(),
    "parallel": set(),
    "observe": {"config"},
    "algorithms": {"config", "packing"},
    "heads": {"parallel"},
    "data": {"config", "packing"},
    "rewards": {"config", "data"},
    "model": {"config", "heads", "packing", "parallel"},
    "checkpoint": {"config", "data", "model", "packing", "parallel"},
    "teacher": {"config", "checkpoint", "heads", "model", "packing", "parallel"},
    "rollout": {"config", "checkpoint", "packing", "parallel"},
}

# Packages of the base install; `config`, `errors` and `cli` use nothing else, not even inside a function.
BASE = {"numpy", "omegaconf", "packaging", "pydantic", "rich", "yaml"}

MAX_LINES = 350


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that a module imports, at its top or inside a function; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports of this project are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    """First part below the project's root: `config`, or `cli` for cli.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def upward_imports(package: str, tree: ast.AST) -> list[str]:
    """Imports of this project that a package of the table must not have."""
    parts = [name.split(".") for name in imported(tree)]
    ours = [part[1] for part in parts if part[0] == "megatron_dgrpo" and len(part) > 1]
    allowed = BELOW[package] | {package, "errors", "points"}
    return [
        name for name in ours if name not in allowed and ((ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file())
    ]


def heavy_imports(tree: ast.AST) -> list[str]:
    known = BASE | set(sys.stdlib_module_names) | {"megatron_dgrpo"}
    return [name for name in imported(tree) if name.split(".")[0] not in known]


def reads_of_parallel_state(tree: ast.AST) -> list[int]:
    """Lines that touch Megatron's global `parallel_state`, whichever way it is named."""
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("parallel_state", "mpu"))
        or (isinstance(node, ast.Name) and node.id in ("parallel_state", "mpu"))
        or (isinstance(node, ast.Import | ast.ImportFrom) and any("parallel_state" in n for n in imported(node)))
    ]
    return sorted(set(lines))


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_all_files_are_seen() -> None:
    assert {package_of(path) for path in FILES} >= {"config", "cli", "errors"} | BELOW.keys()


@pytest.mark.parametrize("package", BELOW)
def test_lower_packages_import_only_what_is_below_them(package: str) -> None:
    found = {str(path): upward_imports(package, parsed(path)) for path in FILES if package_of(path) == package}
    assert not {path: names for path, names in found.items() if names}


def test_the_config_and_the_command_import_nothing_heavy() -> None:
    files = [path for path in FILES if package_of(path) in ("config", "errors", "cli", "__init__")]
    found = {str(path): heavy_imports(parsed(path)) for path in files}
    assert not {path: names for path, names in found.items() if names}


def test_only_rollout_imports_vllm() -> None:
    """Importing vLLM costs seconds and a gigabyte a process, and replaces torch's thread settings."""
    files = [path for path in FILES if package_of(path) != "rollout"]
    assert not [str(path) for path in files if any(name.split(".")[0] == "vllm" for name in imported(parsed(path)))]


def test_only_parallel_reads_megatrons_global_state() -> None:
    files = [path for path in FILES if package_of(path) != "parallel"]
    found = {str(path): reads_of_parallel_state(parsed(path)) for path in files}
    assert not {path: lines for path, lines in found.items() if lines}


def test_files_stay_short() -> None:
    lengths = {str(path): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_the_rules_see_what_they_forbid() -> None:
    assert upward_imports("heads", ast.parse("def f():\n    from megatron_dgrpo.rollout import wire")) == ["rollout"]
    assert upward_imports("packing", ast.parse("import megatron_dgrpo.train.run")) == ["train"]
    assert upward_imports("algorithms", ast.parse("from megatron_dgrpo import model")) == ["model"]
    assert upward_imports("algorithms", ast.parse("from megatron_dgrpo.errors import DataError")) == []
    assert heavy_imports(ast.parse("def f():\n    import torch.nn\nimport yaml")) == ["torch.nn"]
    for source in (
        "from megatron.core import parallel_state",
        "from megatron.core.parallel_state import get_tensor_model_parallel_rank",
        "import megatron.core.parallel_state as mpu",
        "import megatron.core\nmegatron.core.parallel_state.f()",
    ):
        assert reads_of_parallel_state(ast.parse(source)), source

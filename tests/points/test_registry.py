"""Every write, rename, removal and send of the package goes through a named point, but for those listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dgrpo.points.table import POINTS

ROOT = Path(__file__).resolve().parents[2] / "megatron_dgrpo"
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in ("points", "testing")]

_OS = {
    "write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range", "rename", "renames", "replace", "link",
    "symlink", "unlink", "remove", "rmdir", "removedirs", "truncate", "ftruncate", "fsync", "fdatasync", "sync",
    "mkfifo",
}  # fmt: skip
_METHODS = {
    "write_text", "write_bytes", "touch", "unlink", "rmdir", "symlink_to", "hardlink_to", "sendall", "sendmsg",
    "sendto",
}  # fmt: skip
_WRITERS = {"save_file", "NamedTemporaryFile", "mkstemp", "TemporaryFile", "savez", "savetxt", "to_csv"}
_FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"}

PRIVATE = "the run's private folder, which goes with the run"
PROCESSES = "how processes are started, watched and ended; whoever is at the other end finds out when it ends"
ANSWER = "an answer of a process that only looks, to who started it and waits for it"
MAPPED = "a file that is there is mapped; places in it are written at points"
OURS = "a method of this project that has a point"
CODE = "pipes to code that is not trusted, which may end in any way"
ALLOWED: dict[tuple[str, str], str] = {
    ("launch/requests.py", "ask"): PRIVATE,
    ("launch/requests.py", "saved"): PRIVATE,
    ("launch/requests.py", "unsaved"): PRIVATE,
    ("launch/rendezvous.py", "meet"): PRIVATE,
    ("launch/keeper.py", "tend"): PRIVATE,
    ("launch/supervisor.py", "stop"): PRIVATE,
    ("launch/nursery_server.py", "clear_up"): PRIVATE,
    ("launch/nursery_server.py", "send"): PROCESSES,
    ("launch/nursery_server.py", "_redirect"): "a process's log: only read by people",
    ("launch/nursery.py", "start_server"): "a process's log: only read by people",
    ("launch/nursery.py", "send"): PROCESSES,
    ("launch/probes.py", "main"): ANSWER,
    ("launch/dry_run.py", "_look"): PRIVATE,
    ("launch/dry_run.py", "*"): "the file that a dry run was asked for",
    ("launch/trial.py", "*"): "files that `dgrpo eval` and `dgrpo generate` were asked for",
    ("train/checks.py", "main"): ANSWER,
    ("train/dry_run.py", "main"): ANSWER,
    ("train/trial.py", "main"): ANSWER,
    ("train/trial.py", "*"): "files that `dgrpo eval` and `dgrpo generate` were asked for",
    ("train/demo.py", "*"): "the demo's own config",
    ("rewards/confined.py", "*"): CODE,
    ("rewards/code.py", "*"): CODE,
    (
        "rewards/pool.py",
        "*",
    ): "rewards are asked again of another worker, and nothing of them is kept before the journal",
    (
        "rewards/worker.py",
        "*",
    ): "rewards are asked again of another worker, and nothing of them is kept before the journal",
    ("observe/progress.py", "_write"): PRIVATE,
    ("observe/pulse.py", "_run"): PRIVATE,
    ("rewards/judge.py", "*"): "a request over HTTP, by the library's own means: it is tried again",
    ("checkpoint/pruning.py", "remove_left_over"): "a lock file that is there is locked; nothing is written to it",
    ("rollout/transfer.py", "_map"): MAPPED,
    ("rollout/shm_engine.py", "_map"): MAPPED,
    ("rollout/transfer.py", "mapped_file"): OURS,
    ("rollout/workers.py", "_take_names_away"): "names of memory that vLLM's workers share: they have it mapped",
    ("rollout/device_push.py", "push_on_device"): OURS,
}


def _name(node: ast.AST) -> str:
    """`os.path` of an expression of names; its last part where it is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return ""


def _mode(call: ast.Call, place: int) -> str | None:
    """The mode of an `open`; None where it can't be told."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[place : place + 1]
    if not given:
        return "r"
    return given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else None


def forbidden(call: ast.Call) -> bool:
    name = _name(call.func)
    owner, _, last = name.rpartition(".")
    if owner == "os":
        flags = {n.attr for argument in call.args[1:] for n in ast.walk(argument) if isinstance(n, ast.Attribute)}
        variable = last == "open" and any(isinstance(argument, ast.Name) for argument in call.args[1:2])
        return last in _OS or last == "open" and (bool(flags & _FLAGS) or variable)
    if owner == "shutil":
        return last not in ("disk_usage", "which")
    if owner == "points" or not last:
        return False
    if last == "open":
        mode = _mode(call, 1 if isinstance(call.func, ast.Name) else 0)
        return mode is None or bool(set(mode) & set("wax+"))
    if last in ("rename", "replace"):
        return isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords
    if last == "send":
        return owner.rpartition(".")[2].strip("_") in ("socket", "sock", "to_first", "listener")
    if (owner, last) == ("torch", "save") or (owner, last) == ("np", "save"):
        return True
    return last in _METHODS and isinstance(call.func, ast.Attribute) or last in _WRITERS


def found(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(innermost named function, line, call) of all that a module must not do."""

    def look(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Call) and forbidden(child):
                yield inner, child.lineno, ast.unparse(child)
            yield from look(child, inner)

    yield from look(tree, "")


def test_nothing_is_written_renamed_removed_or_sent_but_at_points() -> None:
    problems, used = [], set()
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for function, line, call in found(ast.parse(path.read_text(encoding="utf-8"))):
            keys = {(name, function), (name, "*")} & ALLOWED.keys()
            used |= keys
            if not keys:
                problems.append(f"{name}:{line} in {function or 'the module'}: {call}")
    assert not problems, "\n".join([*problems, "use megatron_dgrpo.points, or say in ALLOWED why not"])
    assert not ALLOWED.keys() - used, "exceptions that nothing uses any more"
    assert all(ALLOWED.values())


_FUNCTIONS = {
    "reached": "place", "open_file": "open", "write": "write", "write_at": "write", "write_file": "file",
    "sync": "sync",
    "sync_folder": "sync", "cut": "cut", "rename": "rename", "remove": "remove", "remove_tree": "tree",
    "remove_left_over": "tree", "send": "send", "send_all": "send",
}  # fmt: skip


def test_every_name_is_in_the_table_and_in_the_code_with_its_kind() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := _name(node.func).removeprefix("points.")) in (
                *_FUNCTIONS,
                "stream",
            ):
                if not isinstance(node.func, ast.Attribute) and name != "remove_left_over":
                    continue
                names = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
                kinds = ["write", "sync"] if name == "stream" else [_FUNCTIONS[name]]
                for point, kind in zip(names, kinds, strict=False):
                    used.setdefault(str(point), set()).add(kind)
    assert {name: {point.kind} for name, point in POINTS.items()} == used
    assert all(point.where for point in POINTS.values())


@pytest.mark.parametrize(
    "source",
    [
        "os.write(1, b'')", "os.replace(a, b)", "os.open(p, os.O_RDWR | os.O_CREAT)", "os.open(p, flags)",
        "open(p, 'w')",
        "open(p, mode='ab')", "path.open('wb')", "p.open(mode)", "shutil.rmtree(p)", "shutil.copyfile(a, b)",
        "path.rename(b)", "path.replace(b)", "path.write_text('')", "self._socket.send(b'')", "sock.sendall(b'')",
        "torch.save(a, p)", "save_file(a, p)", "p.unlink()", "(a / b).touch()", "(a / b).rename(c)",
    ],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(source: str) -> None:
    assert list(found(ast.parse(source))), source


@pytest.mark.parametrize(
    "source",
    [
        "open(p)", "open(p, 'rb')", "path.open('rb')", "os.open(p, os.O_RDONLY)", "text.replace('a', 'b')",
        "points.write('x', f, b'')", "self.server.send(peer, message)", "shutil.which('a')", "path.open()",
    ],
)  # fmt: skip
def test_the_rule_lets_reading_pass(source: str) -> None:
    assert not list(found(ast.parse(source))), source

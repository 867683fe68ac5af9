"""The command line: what it prints, how it ends, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_dgrpo import __version__, cli
from megatron_dgrpo.errors import ConfigError, LaunchError

HEAVY = ("torch", "megatron", "transformers", "tokenizers", "safetensors", "datasets", "vllm", "nemo_run")

REFUSE = f"""
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {HEAVY}:
                raise ModuleNotFoundError(f"{{name}} is refused", name=name)

    sys.meta_path.insert(0, Refuse())
"""


def python(source: str, **options: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def dgrpo(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_dgrpo.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_help_imports_no_torch() -> None:
    done = python(f"""
        import sys
        from megatron_dgrpo.cli import main
        try:
            main(["--help"])
        except SystemExit as end:
            assert end.code == 0
        assert not set({HEAVY!r}) & sys.modules.keys()
    """)
    assert done.returncode == 0, done.stderr
    for command in ("train", "generate", "eval", "report", "engine", "demo", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "config.loader",
        "config.checks",
        "launch.doctor",
        "launch.dry_run",
        "launch.engines",
        "launch.run",
        "launch.trial",
    ],
)
def test_modules_of_the_base_install_work_without_torch(module: str) -> None:
    done = python(textwrap.dedent(REFUSE) + f"import megatron_dgrpo.{module}")
    assert done.returncode == 0, done.stderr


def test_the_refusal_refuses() -> None:
    done = python(textwrap.dedent(REFUSE) + "import torch")
    assert done.returncode == 1 and "torch is refused" in done.stderr


def test_a_config_is_read_and_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run_dirr: runs/a\n")
    done = python(
        textwrap.dedent(REFUSE) + "from megatron_dgrpo.cli import main\nsys.exit(main(['train', 'run.yaml', 'a']))",
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "run_dirr: unknown key; did you mean 'run_dir'?" in done.stderr
    assert "stages: missing" in done.stderr and "override 'a'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_config_is_a_message(tmp_path: Path) -> None:
    done = dgrpo("train", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("dgrpo train: nowhere.yaml does not exist")
    assert "Traceback" not in done.stderr


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}\n")
    done = dgrpo("train", "run.yaml", "seed=-1", cwd=tmp_path)
    assert done.returncode == 2
    assert "seed: -1 should be greater than or equal to 0" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("wrong"), 2), (LaunchError("broken"), 1), (KeyboardInterrupt(), 130)],
)
def test_exit_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.main(["doctor"]) == status
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"dgrpo doctor: {error if str(error) else 'interrupted'}\n"


def test_a_missing_package_is_a_message_and_a_bug_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(name: str) -> object:
        def fail(options: object) -> int:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return fail

    monkeypatch.setattr(cli, "_doctor", lacking("torch"))
    assert cli.main(["doctor"]) == 1
    assert "torch is not installed here; see `dgrpo doctor`" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_doctor", lacking("megatron_dgrpo.nothing"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_a_wrong_command_line_ends_with_2() -> None:
    for arguments in (
        ["fly"],
        ["train"],
        ["doctor", "--for", "nothing"],
        ["doctor", "seed=1"],
        ["train", "c.yaml", "--dry-run", "--fast"],
        ["train", "c.yaml", "--dry-run", "--device-memory", "eighty"],
        [],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2


def test_version() -> None:
    done = dgrpo("--version")
    assert done.returncode == 0 and done.stdout == f"dgrpo {__version__}\n"


def test_overrides_may_follow_options(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}\n")
    done = dgrpo("train", "run.yaml", "a.b=1", "--dry-run", "seed=-1", cwd=tmp_path)
    assert done.returncode == 2
    assert "seed: -1 should be" in done.stderr and "a: unknown key" in done.stderr


def test_a_dry_runs_options_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).resolve().parents[1] / "examples/grpo.yaml"
    assert cli.main(["train", str(example), "--device-memory", "80GiB"]) == 2
    assert "add --dry-run" in capsys.readouterr().err

"""The command `dgrpo`. Each command imports what it runs when it runs: help, and a mistake in a config, need no torch.

Exit status: 0 done; 1 something failed; 2 the user's input cannot be used; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dgrpo import __version__
from megatron_dgrpo.errors import ConfigError, DGRPOError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# What the base install leaves out, and a command may turn out to need.
HEAVY = ("torch", "megatron", "transformers", "tokenizers", "safetensors", "datasets", "vllm", "nemo_run")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        status: int = options.run(options)
        return status
    except DGRPOError as error:
        # A message names its cause and its remedy: where in the code it was raised is nothing to the user.
        print(f"dgrpo {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED
    except ModuleNotFoundError as error:
        if error.name not in HEAVY:
            raise
        print(f"dgrpo {options.command}: {error.name} is not installed here; see `dgrpo doctor`", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"dgrpo {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes what follows an option for no key=value, wherever it stands: `train CONFIG --dry-run seed=1`."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dgrpo",
        description="Long-context post-training on Megatron-Core: GRPO and on-policy distillation in one objective.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="run the stages of a config",
        description="Run the stages of a config. Everything is checked before anything starts.",
    )
    train.add_argument(
        "config", metavar="CONFIG.yaml", type=Path, help="the config; paths in it are relative to the current folder"
    )
    train.add_argument(
        "overrides", metavar="key=value", nargs="*", help="replace a setting: stages.0.steps=100, seed=1"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, say what each rank would hold, write the resolved config, train nothing",
    )
    train.add_argument(
        "--device-memory", metavar="SIZE", type=_size, help="dry run: memory of a device (80GiB), to compare with"
    )
    train.add_argument(
        "--resolved", metavar="FILE", type=Path, help="dry run: where the resolved config goes (RUN_DIR.resolved.yaml)"
    )
    train.set_defaults(run=_train)

    generate = commands.add_parser(
        "generate",
        help="responses of a model, or of a run's model, to the prompts of a dataset",
        description="Write responses as JSON lines: prompt, answer, response, finish reason.",
    )
    _trial_arguments(generate)
    generate.add_argument("--out", metavar="FILE", type=Path, required=True, help="where the lines go")
    generate.add_argument("--token-ids", action="store_true", help="with the ids of prompts and responses")
    generate.add_argument("--logprobs", action="store_true", help="with the log-prob of each sampled token")
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "eval",
        help="mean reward of a model, or of a run's model, on a dataset",
        description="Print avg@k with its standard error, and the mean of each reward.",
    )
    _trial_arguments(evaluate)
    evaluate.add_argument("--json", metavar="FILE", type=Path, help="the figures as JSON, too")
    evaluate.add_argument("--responses", metavar="FILE", type=Path, help="every response with its rewards, as lines")
    evaluate.set_defaults(run=_eval)

    report = commands.add_parser(
        "report",
        help="one HTML page about a run: curves, times, rollouts, events",
        description="Write one HTML page about a run, with everything in it; a run that goes on has one, too.",
    )
    report.add_argument("folder", metavar="RUN", type=Path, help="the run's folder (run_dir)")
    report.add_argument("--out", metavar="FILE", type=Path, help="where to write it (RUN/report.html)")
    report.set_defaults(run=_report)

    demo = commands.add_parser(
        "demo",
        help="train a tiny student by dGRPO with a real engine, in minutes on two cores",
        description="Make a retrieval task, a teacher and a student, run dGRPO with a real vLLM engine, and print the "
        "held-out reward before and after.",
    )
    demo.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="folder for all of it (%(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the task, the models and the rollouts (%(default)s)")
    demo.set_defaults(run=_demo)

    engine = commands.add_parser(
        "engine",
        help="start an engine of a config by itself, for a run that names its address",
        description="Start one engine host of a config, for a run whose config has its address under "
        "engines.NAME.addresses. It ends with the run that uses it.",
    )
    engine.add_argument("config", metavar="CONFIG.yaml", type=Path, help="the run's config")
    engine.add_argument("name", metavar="NAME", help="the engine's name in it")
    engine.add_argument("overrides", metavar="key=value", nargs="*", help="replace a setting: engines.NAME.threads=8")
    engine.add_argument(
        "--listen", metavar="ADDRESS", required=True, help="tcp:HOST:PORT, of one interface, or unix:/PATH"
    )
    engine.add_argument(
        "--key-file",
        metavar="FILE",
        required=True,
        help="file with the key that both sides know, readable by you alone",
    )
    engine.set_defaults(run=_engine)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, what is missing, what that disables, and the remedy",
        description="Print what was found of all that the project can use, with versions. Exit status 1 when something "
        "that is needed for the named work is missing.",
    )
    doctor.add_argument(
        "--for",
        dest="works",
        choices=("train", "rollout", "launch"),
        action="append",
        help="the work that must be possible; may be repeated (train and rollout)",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _trial_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="MODEL|RUN", type=Path, help="a model's folder, or a run's (run_dir)")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="settings of a config: evaluation.sampling.temperature=0.6, evaluation.rewards=[{kind: number}], "
        "models.student.dtype=float32, engines.rollout.max_model_len=4096",
    )
    parser.add_argument("--data", metavar="FILE", help="rows (evaluation.data.path); a run's own where none is given")
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="responses to each prompt (%(default)s)")
    parser.add_argument("--prompts", type=int, metavar="N", help="only the first N rows")


def _generate(options: argparse.Namespace) -> int:
    from megatron_dgrpo.launch.trial import generate

    return generate(
        options.folder,
        options.overrides,
        data=options.data,
        samples=options.samples,
        prompts=options.prompts,
        out=options.out,
        token_ids=options.token_ids,
        logprobs=options.logprobs,
    )


def _eval(options: argparse.Namespace) -> int:
    from megatron_dgrpo.launch.trial import evaluate

    return evaluate(
        options.folder,
        options.overrides,
        data=options.data,
        samples=options.samples,
        prompts=options.prompts,
        figures=options.json,
        responses=options.responses,
    )


def _train(options: argparse.Namespace) -> int:
    from megatron_dgrpo.config.loader import load

    config = load(options.config, options.overrides)
    if options.dry_run:
        from megatron_dgrpo.launch.dry_run import dry_run

        return dry_run(config, device_memory=options.device_memory, resolved=options.resolved)
    if options.device_memory is not None or options.resolved is not None:
        raise ConfigError("--device-memory and --resolved belong to a dry run: add --dry-run, or leave them out")
    from megatron_dgrpo.launch.run import train

    return train(config)


def _size(text: str) -> int:
    from megatron_dgrpo.launch.dry_run import parse_bytes

    return parse_bytes(text)


def _engine(options: argparse.Namespace) -> int:
    from megatron_dgrpo.config.loader import load
    from megatron_dgrpo.launch.engines import serve

    return serve(load(options.config, options.overrides), options.name, options.listen, options.key_file)


def _report(options: argparse.Namespace) -> int:
    from megatron_dgrpo.launch.report import report

    print(report(options.folder, options.out))
    return OK


def _demo(options: argparse.Namespace) -> int:
    from megatron_dgrpo.train.demo import run_demo

    return run_demo(options.out, options.seed)


def _doctor(options: argparse.Namespace) -> int:
    from megatron_dgrpo.launch.doctor import examine

    return examine(options.works or ["train", "rollout"])


if __name__ == "__main__":
    sys.exit(main())

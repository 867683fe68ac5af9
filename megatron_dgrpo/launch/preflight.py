"""What is found out about a run's models before any process starts. Imports no torch."""

from __future__ import annotations

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.headers import check_tensors
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.errors import ConfigError, ConversionError, listing
from megatron_dgrpo.model.layouts import layout_problems


def check_models(config: Config) -> None:
    """Architecture, tensors and layout of the student and every teacher; all problems of all of them in one error."""
    problems = []
    for name in dict.fromkeys([config.student, *(teacher.model for teacher in config.teachers)]):
        model = config.models[name]
        try:
            spec = read_spec(model.path, model.rope)
            check_tensors(model.path, rules(spec), spec)
        except ConversionError as error:
            problems.append(f"models.{name}: {error}")
            continue
        problems += [f"models.{name}.layout: {problem}" for problem in layout_problems(spec, model.layout)]
    if problems:
        raise ConfigError(listing("The models can't be used as they are:", problems))

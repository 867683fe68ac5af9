"""Which figures a stage reports, as far as its settings tell: for settings that name one.

Figures by position, by source, by teacher and the like come with names of their own: they are recognised by their form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_dgrpo.config.endings import StopWhen
from megatron_dgrpo.config.explain import nearest
from megatron_dgrpo.config.objective import Rewarded
from megatron_dgrpo.config.overlong import Penalise
from megatron_dgrpo.config.schema import KD, Config, OnPolicy, Selective, Stage, Static

_OF_TEACHERS = r"teacher_(kl|forward_kl|jsd)/\w+|kl/.+|row/(kl|teacher_mass|outside_mass|removed_mass)"


def problems(config: Config) -> Iterator[str]:
    for i, stage in enumerate(config.stages):
        for j, condition in enumerate(stage.stop_when):
            yield from (f"stages.{i}.stop_when.{j}.{problem}" for problem in _problems(config, stage, condition))


def _problems(config: Config, stage: Stage, condition: StopWhen) -> Iterator[str]:
    if (condition.above is None) == (condition.below is None):
        yield "above: give a limit: either above or below"
    name = condition.metric
    if name.startswith("heldout/") and config.evaluation is None:
        yield f"metric: {name} comes from evaluations, and there is no section evaluation; add one"
        return
    if not is_reported(config, stage, name):
        yield f"metric: this stage reports no {name!r}{nearest(name, figures(config, stage))}"


def is_reported(config: Config, stage: Stage, name: str) -> bool:
    """Whether a stage may report a figure of this name."""
    return name in figures(config, stage) or bool(re.fullmatch("|".join(_forms(stage)), name.partition("@")[0]))


def figures(config: Config, stage: Stage) -> set[str]:
    """Names that a stage may report, its evaluations' among them."""
    found = {"loss", "nonfinite_rows", "grad_norm", "lr", "tokens", "dropped", "data/skipped", "skipped_steps"}
    found.add("data/retries")
    found |= {"policy/logprob", "policy/entropy"}
    if config.evaluation is not None:
        found |= {f"heldout/{name}" for name in ("reward", "prompts", "length", "skipped")}
        found |= {f"heldout/score/{reward.label}" for reward in config.evaluation.rewards}
    if isinstance(stage, Static):
        found |= {"examples", "loss_tokens"}
    if isinstance(stage, OnPolicy):
        found |= {"groups", "equal_groups", "loss_tokens", "policy/moved_kl", "response/length", "response/truncated"}
        found |= {f"mismatch/{name}" for name in ("abs", "p99", "max", "ratio", "outside", "k1", "k3")}
        found |= {"response/length_above", "response/length_below", "reward/skipped"}
        if stage.rewards:
            found |= {"reward/mean", "reward/std", *(f"reward/score/{reward.label}" for reward in stage.rewards)}
        if isinstance(stage, Selective) and stage.filter is not None:
            found |= {"filter/passed_over", "filter/always", "filter/never"}
        if isinstance(stage, Selective) and stage.dynamic_sampling is not None:
            found |= {"sampling/rounds", "sampling/dropped", "sampling/wasted_tokens"}
        if isinstance(stage.objective.overlong, Penalise):
            found.add("reward/overlong")
    return found


def _forms(stage: Stage) -> Iterator[str]:
    yield from (
        r"heldout/failed/.+",
        r"mixture/.+",
        r"disagree/.+",
        r"gradient/.+",
        r"row/entropy",
        r"tokens",
        r"entropy/\w+",
    )
    if isinstance(stage, OnPolicy):
        yield from (r"mismatch/\w+", r"correction/\w+", r"reward/failed/.+")
        if isinstance(stage.objective, Rewarded):
            yield r"surrogate/\w+"
    if isinstance(stage, Static):
        yield r"nll/\w+"
    if isinstance(stage, OnPolicy | KD) and stage.uses_teacher:
        yield from (_OF_TEACHERS, r"preflight/\w+", r"row/topk_\w+")

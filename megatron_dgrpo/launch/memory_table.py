"""A stage's memory as a table, a line for each run of ranks that hold as much. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_dgrpo.config.schema import DGRPO, Config
from megatron_dgrpo.launch.memory import (
    AnyStage,
    Sized,
    rank_tokens,
    student_parts,
    teacher_on_student,
    teacher_parts,
)
from megatron_dgrpo.model.flops import forward_cost, training_cost
from megatron_dgrpo.packing.cost import Cost, trunk_pairs

_COLUMNS = ("weights", "gradients", "optimizer", "activations", "head", "teacher", "rows")
Parts = Counter[str]


def rank_memory(config: Config, number: int, sized: Mapping[str, Sized], *, gpu: bool) -> list[tuple[Parts, Parts]]:
    """For each rank of the run: bytes on its device, and in host memory."""
    stage, student = config.stages[number], sized[config.student]
    layout = student.model.layout
    taught = isinstance(stage, DGRPO) and stage.objective.uses_teacher
    teachers = config.teachers if taught else ()
    found: list[tuple[Parts, Parts]] = [(Counter(), Counter()) for _ in range(config.num_ranks)]
    for rank in range(layout.world_size):
        found[rank][0].update(student_parts(student, rank, stage, teachers=len(teachers), gpu=gpu))
    for settings, first in zip(teachers, config.first_ranks[:-1] if teachers else (), strict=True):
        assert isinstance(stage, DGRPO)
        teacher = sized[settings.model]
        for rank in range(teacher.model.layout.world_size):
            _add(found[first + rank], teacher_parts(teacher, settings, rank, stage))
        for rank in range(layout.world_size):
            if student.stage_of(rank) == layout.pp - 1:
                _add(found[rank], teacher_on_student(teacher, settings, student, stage))
    return found


def _add(to: tuple[Parts, Parts], more: tuple[Mapping[str, int], Mapping[str, int]]) -> None:
    for parts, added in zip(to, more, strict=True):
        parts.update(added)


def widest_rank(config: Config, number: int, sized: Mapping[str, Sized], *, gpu: bool) -> int:
    return max(device.total() for device, _ in rank_memory(config, number, sized, gpu=gpu))


def stage_lines(
    config: Config, number: int, sized: Mapping[str, Sized], *, gpu: bool, device_memory: int | None
) -> list[str]:
    stage = config.stages[number]
    ranks = rank_memory(config, number, sized, gpu=gpu)
    last = ["total", *(["of device"] if device_memory else []), "in host memory"]
    rows = [["ranks", *_COLUMNS, *last]]
    for first, end in _runs(ranks):
        device, host = ranks[first]
        total = [in_words(device.total())]
        share = [f"{device.total() / device_memory:.0%}"] if device_memory else []
        cells = [in_words(device[name]) if device[name] else "" for name in _COLUMNS]
        name = f"{first}" if end == first + 1 else f"{first} to {end - 1}"
        rows.append([name, *cells, *total, *share, in_words(host.total()) if host else ""])
    return [f"stages.{number} ({stage.kind}), bytes on each rank:", *_aligned(rows), *_costs(config, stage, sized), ""]


def _runs(ranks: Sequence[tuple[Parts, Parts]]) -> list[tuple[int, int]]:
    """First and end of neighbours that hold the same."""
    runs: list[tuple[int, int]] = []
    for rank, one in enumerate(ranks):
        if runs and ranks[runs[-1][0]] == one:
            runs[-1] = (runs[-1][0], rank + 1)
        else:
            runs.append((rank, rank + 1))
    return runs


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    used = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return ["  " + "  ".join(row[i].rjust(widths[i]) for i in used).rstrip() for row in rows]


def _costs(config: Config, stage: AnyStage, sized: Mapping[str, Sized]) -> list[str]:
    """FLOPs of the largest micro-batch, were it one sequence whose every token is a loss row."""
    tokens = stage.micro_batch_tokens

    def flops(cost: Cost) -> str:
        return f"{(cost.token * tokens + cost.pair * trunk_pairs(tokens) + cost.row * tokens) / 1e12:,.3g} TFLOP"

    student = sized[config.student]
    here = rank_tokens(student.model, tokens)
    words = f"  a micro-batch of {tokens} tokens ({here} on a rank): forward and backward "
    words += flops(training_cost(student.spec))
    if isinstance(stage, DGRPO) and stage.objective.uses_teacher:
        for teacher in config.teachers:
            words += f", {teacher.model}'s forward {flops(forward_cost(sized[teacher.model].spec))}"
    return [words]


def in_words(size: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = next((i for i in range(4) if size < 1024 ** (i + 1)), 4)
    number = size / 1024**power
    return f"{number:.0f} {units[power]}" if power == 0 or number >= 100 else f"{number:.3g} {units[power]}"

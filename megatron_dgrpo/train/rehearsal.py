"""A dry batch of the greatest lengths before a stage's first step: what does not fit into memory shows at once.

The batch is made up: of a rollout stage, groups of the longest prompt that leaves room for the longest responses, of a
static one, examples as long as the data's longest (of a stream, as long as a micro-batch). There are as many as fill
every rank's pipeline with full micro-batches, and no more than a step has: further micro-batches take time and no
memory. Everything is done with it that an update does, teachers and the diagnostics of a first step included, up to the
whole gradient. Then nothing is left of it: weights and optimizer are not touched, gradient buffers are cleared by each
update, random states are put back, no row of the data is taken.

What a first step adds is not there yet: on a GPU, as much memory as the optimizer's moments and the teachers' rows of
the rest of the batch will take is held meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.schema import OnPolicy, Stage, Static
from megatron_dgrpo.data.dataset import Rows
from megatron_dgrpo.data.lengths import longest
from megatron_dgrpo.errors import CapacityError
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.rng import random_states, restore_random_states, to_text
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.student import Student
from megatron_dgrpo.train.teachers import Lesson
from megatron_dgrpo.train.update import Gradients, Work

_READ_S = 3600.0
"""What the other ranks allow rank 0 for finding the longest row."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class Size:
    """Of a dry batch: groups of a prompt and its responses."""

    groups: int
    prompt: int
    responses: int
    response: int
    of: int
    """Groups that a step may have."""

    @property
    def words(self) -> str:
        what = f"{self.responses} responses of {self.response:,}" if self.responses > 1 else f"{self.response:,}"
        return f"{self.groups} x (a prompt of {self.prompt:,} tokens and {what})"


Make = Callable[[Sequence[Trajectory]], Work]
"""Packs trajectories as the stage's updates are, without what teachers say."""


def rehearse(run: Run, stage: Stage, number: int, make: Make | None) -> None:
    """On all ranks of the world; those without a part of the student have no `make`."""
    if make is None and not stage.uses_teacher:
        return  # the student's ranks are among themselves
    if stage.uses_teacher:
        run.load_teachers()
    _lay_engines_to_rest(run, stage)
    size = _size(run, stage, number)
    states, began = random_states(), time.monotonic()
    with _told(run, stage, number, size):
        packed, peak = _go_through(run, stage, size, make)
    restore_random_states(to_text(states))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    peaks = _of_all_ranks(peak) if stage.uses_teacher else _of_all_ranks(peak, run.groups.world)
    most = max(range(len(peaks)), key=peaks.__getitem__)
    run.note(
        f"stage {number} ({run.config.stages[number].kind}): a batch of the greatest lengths fits: {size.words}, in "
        f"{packed}, in {time.monotonic() - began:.1f} s; {peaks[most] / 2**30:.2f} GiB at most (rank {most})",
        kind="memory",
    )


def _go_through(run: Run, stage: Stage, size: Size, make: Make | None) -> tuple[str, int]:
    """All of an update but the update; how the batch was packed, and this rank's peak of memory."""
    _peak(reset=True)
    trajectories, packed = _trajectories(run, stage, size), ""
    lessons: tuple[Lesson, ...] = ()
    if stage.uses_teacher:
        lessons = run.load_teachers().teach(trajectories, run.packing(stage.micro_batch_tokens))
    if make is not None:
        work = replace(make(trajectories), lessons=lessons)
        most = max(layout.num_tokens for layout in work.layouts)
        packed = f"micro-batches of up to {most:,} tokens ({len(work.layouts)} on rank {run.rank})"
        held = _held(run.trained, stage, lessons, size)
        Gradients(run.trained).add(work)
        run.trained.reduce_gradients()
        run.trained.zero_grad()
        del held
    return packed, _peak()


# ---- what is made up ----


def _size(run: Run, stage: Stage, number: int) -> Size:
    """The largest that the settings, and static data, allow."""
    packing, layout = run.packing(stage.micro_batch_tokens), run.model.layout
    limit = min(packing.room, run.spec.max_positions)
    places = layout.dp * layout.pp * layout.vpp  # micro-batches that are under way at one time
    match stage:
        case OnPolicy():
            limit = min(limit, run.config.engines[stage.engine].max_model_len)
            response = min(stage.sampling.max_tokens, limit - 1)
            prompt, responses = limit - response, stage.group_size
            of = stage.prompts_per_step
        case Static():
            prompt, response = _longest_row(run, stage, number)
            if prompt + response > limit:  # it is dropped, or a stream's
                prompt, response = 1, limit - 1
            responses = 1
            of = stage.batch_size or -(-(stage.batch_tokens or 1) // (prompt + response))
        case _:
            raise AssertionError(stage)
    tokens = prompt + responses * response
    groups = min(of, places * max(1, packing.room // tokens))
    return Size(groups, prompt, responses, response, of)


def _longest_row(run: Run, stage: Static, number: int) -> tuple[int, int]:
    """Rank 0 looks; the others wait for it in the store. As long as anything for streams."""
    if stage.data.streaming:
        return run.spec.max_positions, stage.micro_batch_tokens
    key = f"longest row/{number}"
    if run.rank == 0:
        found = []
        for source in stage.data.sources:
            rows = Rows(source, needs_answer=True)
            watched = run.board.over(rows, f"look for the longest row of {Path(source.where).name}", len(rows), "rows")
            found.append(longest(watched, run.tokenizer))
        run.store.set(key, "{} {}".format(*max(found, key=sum)))
    run.store.wait([key], timedelta(seconds=_READ_S))
    prompt, response = map(int, run.store.get(key).split())
    return prompt, response


def _trajectories(run: Run, stage: Stage, size: Size) -> list[Trajectory]:
    """The same on every rank: ids that all models have, rewards that differ within each group."""
    draw = np.random.default_rng(0)
    names = run.teacher_names if stage.uses_teacher else ()
    paths = {name: run.config.models[name] for name in names}
    vocab = min([run.spec.vocab_size, *(read_spec(m.path, m.rope).vocab_size for m in paths.values())])
    labels = [reward.label for reward in stage.rewards] if isinstance(stage, OnPolicy) else []

    def segment() -> Segment:
        tokens = draw.integers(0, vocab, size.response).astype(np.int32)
        logprobs = np.full(size.response, -np.log(vocab), np.float32)
        return Segment(tokens, True, logprobs, weight_versions=np.zeros(size.response, np.int32))

    found = []
    for group in range(size.groups):
        prompt = draw.integers(0, vocab, size.prompt).astype(np.int32)
        teacher = names[group % len(names)] if names else None
        for sample in range(size.responses):
            rewards = dict.fromkeys(labels, float(sample % 2))
            found.append(Trajectory(f"dry {group}", sample, prompt, (segment(),), "stop", rewards, teacher))
    return found


# ---- memory ----


def _held(student: Student, stage: Stage, lessons: Sequence[Lesson], size: Size) -> list[torch.Tensor]:
    """On a GPU, what the first step allocates and the dry batch does not."""
    if not torch.cuda.is_available():
        return []
    rest = max(0.0, size.of / size.groups - 1)
    rows = [one.rows.hidden_MH for one in lessons if one.rows is not None and one.rows.hidden_MH.is_cuda]
    num_bytes = sum(hidden.nbytes for hidden in rows) * rest
    if not student.made:
        masters = sum(p.numel() for group in student.optimizer.param_groups for p in group["params"])
        num_bytes += 8 * masters * (1 - stage.optimizer.cpu_offload)  # two moments in float32
    return [torch.empty(int(num_bytes), dtype=torch.uint8, device=platform.device())]


def _peak(*, reset: bool = False) -> int:
    """The most memory that this process has had: of the device since the last reset; of the host, where there is no
    device, ever."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_reserved()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("VmHWM"))


def _of_all_ranks(mine: int, group: dist.ProcessGroup | None = None) -> list[int]:
    """Of all ranks of the world, or of a group."""
    everyone: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _lay_engines_to_rest(run: Run, stage: Stage) -> None:
    """An engine on the same GPUs holds memory until it sleeps, as it does whenever there is an update."""
    names = [stage.engine] if isinstance(stage, OnPolicy) else []
    names += [run.config.evaluation.engine] if run.config.evaluation is not None else []
    for name in dict.fromkeys(names):
        if run.config.engines[name].placement == "colocated":
            run.sync(name)
            run.rest(name)


@contextmanager
def _told(run: Run, stage: Stage, number: int, size: Size) -> Iterator[None]:
    """Running out of memory as an error that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = str(error).lower()
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            if not any(sign in words for sign in _NO_MEMORY):
                raise
        first = str(error).strip().splitlines()[0] if words.strip() else type(error).__name__
        raise CapacityError(
            f"stage {number} ({run.config.stages[number].kind}): a batch of the greatest lengths does not fit into "
            f"memory (rank {run.rank}, {_peak() / 2**30:.2f} GiB at most): {size.words}, packed into micro-batches of "
            f"{stage.micro_batch_tokens:,} tokens. {first}\n{_remedy(run, stage, number)}"
        ) from error


def _remedy(run: Run, stage: Stage, number: int) -> str:
    at, student = f"stages.{number}", f"models.{run.config.student}"
    lower: Mapping[str, int] = {f"{at}.micro_batch_tokens": stage.micro_batch_tokens}
    if isinstance(stage, OnPolicy):
        engine = run.config.engines[stage.engine]
        lower = {**lower, f"engines.{stage.engine}.max_model_len": engine.max_model_len}
        lower = {**lower, f"{at}.sampling.max_tokens": stage.sampling.max_tokens, f"{at}.group_size": stage.group_size}
    settings = ", ".join(f"{name}={value}" for name, value in lower.items())
    more = [f"set {student}.recompute=full", f"raise {student}.layout (cp, tp, pp)"]
    if stage.uses_teacher:
        more.append("set teachers.N.rows_in=host or weights_in=host")
    return f"Lower {settings}; or {'; or '.join(more)}. {at}.dry_batch=false goes on without this batch"

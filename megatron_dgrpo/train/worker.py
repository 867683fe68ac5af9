"""What a trainer rank does from start to end: join the others, build the run, go through the stages, export."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.pruning import remove_left_overs
from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.schema import Config, Layout, OnPolicy, Static
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.launch.rendezvous import join_world
from megatron_dgrpo.launch.requests import Requests
from megatron_dgrpo.observe.pulse import Pulse
from megatron_dgrpo.observe.records import Records
from megatron_dgrpo.observe.trackers import trackers
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Groups
from megatron_dgrpo.rewards.pool import RewardPool
from megatron_dgrpo.rollout.journal import Journal
from megatron_dgrpo.train.assist import assist
from megatron_dgrpo.train.dgrpo import run_dgrpo
from megatron_dgrpo.train.engines import Engines
from megatron_dgrpo.train.epochs import with_steps
from megatron_dgrpo.train.options import load_run_student
from megatron_dgrpo.train.orders import Ended, Waiting
from megatron_dgrpo.train.resuming import cut_records, find
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.saving import Progress
from megatron_dgrpo.train.static import run_static


def main(
    *,
    config_path: str,
    engines: Mapping[str, Sequence[str]],
    key: str,
    control: str,
    shm_prefix: str,
    requests: str,
    identities: Mapping[str, str],
) -> None:
    """Target of the supervisor. `engines` are the addresses of the engine hosts that it starts, replica by replica,
    `control` its own, `requests` the folder of what it asks for, `identities` what the run is made with."""
    Pulse()
    config = load(config_path)
    torch.set_num_threads(config.threads_per_rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = join_world(backend=platform.backend(), timeout_s=config.collective_timeout_s)
    config = with_steps(config, store)
    resumed = find(config.run_dir)
    said: list[str] = []
    if dist.get_rank() == 0:
        remove_left_overs(config.run_dir)
        said = cut_records(config.run_dir, resumed)
    run = _build(config, store, Engines(config, engines, key, control), shm_prefix, requests)
    for words in said:
        run.note(words, kind="resume", level="warning" if "not whole" in words else "info")
    progress = Progress(run, resumed, identities)
    try:
        for number in range(progress.first_stage, len(config.stages)):
            _stage(run, number, progress)
    except Ended as ended:
        progress.end(ended)
    else:
        progress.finish()
        target = Path(config.run_dir) / "hf"
        if run.student is not None:
            run.export(target)
        run.note(f"exported to {target}")
    if run.records is not None:
        run.records.close()
    dist.barrier()  # the engines end with this process, and no rank may still need them
    dist.destroy_process_group()
    if run.rewards is not None:
        run.rewards.close()


def _stage(run: Run, number: int, progress: Progress) -> None:
    match run.config.stages[number]:
        case stage if run.student is None:
            assist(run, stage, number, progress)
        case Static() as stage:
            run_static(run, stage, number, progress)
        case OnPolicy() as stage:
            run_dgrpo(run, stage, number, progress)


def _build(config: Config, store: dist.Store, engines: Engines, shm_prefix: str, requests: str) -> Run:
    model = config.models[config.student]
    groups = _groups(model.layout, config)
    teacher_groups = tuple(
        _groups(config.models[teacher.model].layout, config, first_rank)
        for teacher, first_rank in zip(config.teachers, config.first_ranks[:-1], strict=True)
    )
    next(mine for mine in (groups, *teacher_groups) if mine.member).seed(config.seed)
    torch.manual_seed(config.seed)
    first = dist.get_rank() == 0
    student = load_run_student(config, groups) if groups.member else None
    return Run(
        config=config,
        groups=groups,
        student=student,
        tokenizer=Tokenizer.load(model.path),
        store=store,
        engines=engines if first else None,
        records=_records(config) if first else None,
        journal=Journal(Path(config.run_dir) / "rollouts", keep=config.keep_rollouts) if first else None,
        shm_prefix=shm_prefix,
        rewards=RewardPool(config.reward_workers, log_dir=Path(config.run_dir) / "logs") if first else None,
        teacher_groups=teacher_groups,
        waiting=Waiting(Requests(requests)) if first else None,
    )


def _records(config: Config) -> Records:
    return Records(
        config.run_dir,
        trackers=trackers(config.trackers, config.run_dir, config.model_dump(mode="json")),
        steps=[stage.steps for stage in config.stages],
    )


def _groups(layout: Layout, config: Config, first_rank: int = 0) -> Groups:
    return Groups(
        tp=layout.tp,
        cp=layout.cp,
        dp=layout.dp,
        pp=layout.pp,
        ep=layout.ep,
        etp=layout.etp,
        first_rank=first_rank,
        timeout_s=config.collective_timeout_s,
    )

"""What the stages of a run share: models, engines, the control plane between ranks, records.

Waiting for a rollout is never done inside a collective: rank 0 talks to the engines, and the other ranks wait for
what it publishes in a store, with a deadline. Collectives only ever see tensors that are ready on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch.distributed as dist

from megatron_dgrpo.checkpoint.hf.exporter import export_folder, export_shards, manifest
from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.output_files import nbytes
from megatron_dgrpo.config.rewards import AnyReward
from megatron_dgrpo.config.schema import Config, Model, Stage, Teacher
from megatron_dgrpo.data.dataset import PromptSource, Rows
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import RolloutError, TransferError, listing
from megatron_dgrpo.model.flops import training_cost
from megatron_dgrpo.model.layouts import padding_unit
from megatron_dgrpo.model.spec import ModelSpec
from megatron_dgrpo.observe.events import Level
from megatron_dgrpo.observe.progress import Board
from megatron_dgrpo.observe.records import Records
from megatron_dgrpo.observe.timers import Phases
from megatron_dgrpo.packing.layout import Layout
from megatron_dgrpo.packing.limits import Limits, keep_fitting
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.packing.trees import Tree
from megatron_dgrpo.parallel import platform
from megatron_dgrpo.parallel.groups import Groups
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.compose import Settled, settle
from megatron_dgrpo.rewards.pool import RewardPool
from megatron_dgrpo.rollout import fp8
from megatron_dgrpo.rollout.board import Board as StoreBoard
from megatron_dgrpo.rollout.delivery import deliver, tell_gpu, trainer_side
from megatron_dgrpo.rollout.journal import Journal
from megatron_dgrpo.rollout.messages import Chunk, WeightsWanted
from megatron_dgrpo.rollout.pool import Pool
from megatron_dgrpo.teacher.frozen import FrozenTeacher, load_teacher
from megatron_dgrpo.train.announcements import Announcements
from megatron_dgrpo.train.engines import Engines
from megatron_dgrpo.train.epochs import prompt_source
from megatron_dgrpo.train.options import DTYPES, build_options
from megatron_dgrpo.train.orders import Ended, Order, Waiting
from megatron_dgrpo.train.stopping import Stopping
from megatron_dgrpo.train.student import Student
from megatron_dgrpo.train.teachers import Teachers

_VERDICT_S = 60.0
"""What ranks allow rank 0 for looking after its engines, apart from waiting for them."""


@dataclass
class Run:
    config: Config
    groups: Groups
    student: Student | None  # on ranks that are not a teacher's alone
    tokenizer: Tokenizer
    store: dist.Store
    engines: Engines | None  # on rank 0
    records: Records | None  # on rank 0
    journal: Journal | None  # on rank 0
    shm_prefix: str
    rewards: RewardPool | None = None  # on rank 0
    teacher_groups: tuple[Groups, ...] = ()
    teachers: Teachers | None = None
    waiting: Waiting | None = None  # on rank 0
    stopping: Stopping | None = None  # of the stage
    versions: dict[str, int] = field(default_factory=dict)  # of the weights that each engine has
    version: int = 0  # of the student's weights: the number of updates so far
    _failed: dict[str, float] = field(default_factory=dict)  # of rewards, since it was last asked for

    def __post_init__(self) -> None:
        self._announcements = Announcements(self.store)
        if self.engines is not None:
            self.engines.restore, self.engines.note = self._restore, self.note
            self.engines.trainer = lambda: trainer_side(self.store, self.groups.grid.ranks, platform.device())
        if self.student is not None:
            tell_gpu(self.store, self.rank, platform.device())

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def model(self) -> Model:
        return self.config.models[self.config.student]

    @cached_property
    def heldout(self) -> list[PromptRow]:
        """The evaluation's prompts."""
        settings = self.config.evaluation
        return Rows(settings.data)[: settings.num_prompts] if settings else []

    def prompts(self, stage: Stage, number: int) -> PromptSource:
        """A stage's rows, in the order in which it takes them."""
        return prompt_source(stage, self.tokenizer, seed=self.config.seed + number)

    @property
    def trained(self) -> Student:
        """The student; only ranks that have a part of it ask."""
        assert self.student is not None
        return self.student

    @cached_property
    def spec(self) -> ModelSpec:
        """The student's."""
        return read_spec(self.model.path, self.model.rope)

    def packing(self, max_tokens: int) -> Packing:
        """How the student's ranks share out a batch; every rank of the world knows it."""
        grid, model = self.groups.grid, self.model
        return Packing(
            max_tokens,
            dp=grid.dp,
            cp=grid.cp,
            multiple_of=padding_unit(tp=grid.tp, sequence_parallel=model.layout.sequence_parallel, fp8=model.fp8),
            rounds_of=grid.pp if model.layout.vpp > 1 else 1,
            cost=training_cost(self.spec),
        )

    def micro_batches(self, trees: Sequence[Tree], max_tokens: int) -> list[Layout]:
        """This rank's micro-batches of a batch that all ranks know."""
        place = self.groups.grid.coordinate
        return self.packing(max_tokens).micro_batches(trees, rank=place("dp"), cp_rank=place("cp"))

    def fitting(
        self, trajectories: Sequence[Trajectory], stage: Stage, facts: dict[str, float], *, whole: bool = True
    ) -> list[Trajectory]:
        """Without those that are too long, where the stage drops them; `facts` adds them up. Of a batch that is not
        whole none may be left."""
        limits = Limits(
            room=self.packing(stage.micro_batch_tokens).room,
            room_setting=f"micro_batch_tokens={stage.micro_batch_tokens}",
            max_positions=self.spec.max_positions,
            vocab_size=self.spec.vocab_size,
        )
        found = keep_fitting(trajectories, limits, stage.on_overlong, may_be_empty=not whole)
        if stage.on_overlong == "drop":
            facts["dropped"] = facts.get("dropped", 0.0) + len(found.dropped)
        if found.dropped:
            self.note(
                listing(f"{len(found.dropped)} sequences are too long and were dropped:", found.dropped),
                kind="drop",
                level="warning",
            )
        return found.trajectories

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return tuple(teacher.model for teacher in self.config.teachers)

    def load_teachers(self) -> Teachers:
        """The teachers, loaded when the first stage asks for them, on every rank of the world."""
        if self.teachers is None:
            pairs = zip(self.config.teachers, self.teacher_groups, strict=True)
            models = tuple(self._load(teacher, groups) for teacher, groups in pairs)
            self.teachers = Teachers(self.teacher_names, models)
        return self.teachers

    def _load(self, teacher: Teacher, groups: Groups) -> FrozenTeacher:
        model = self.config.models[teacher.model]
        with self.board.task(f"load {teacher.model}"):
            return load_teacher(
                model.path,
                groups=groups,
                options=build_options(model),
                student_spec=self.spec,
                student_groups=self.groups,
                rope=model.rope,
                weights_in=teacher.weights_in,
                rows_in=teacher.rows_in,
            )

    def sync(self, engine: str) -> None:
        """Give an engine the student's weights, unless it has them."""
        if self.student is None or self.versions.get(engine) == self.version:
            return
        what = "weights to the engine" if engine in self.versions else "wait for the engine, weights to it"
        with self.board.task(what):
            self._give(engine, everywhere=True)
        self.versions[engine] = self.version

    def rest(self, engine: str) -> None:
        """A colocated engine has generated what is trained on now: the GPUs are the student's until the next sync."""
        if self.config.engines[engine].placement == "colocated" and self.versions.pop(engine, None) is not None:
            if self.engines is not None:
                self.engines.client(engine).sleep()

    def _restore(self, engine: str) -> None:
        """On rank 0, in the middle of a batch: have all ranks give the replicas that were lost the batch's weights."""
        if self.versions.get(engine) != self.version:
            raise RolloutError(
                f"engine {engine} was lost with version {self.versions.get(engine)} of the weights, which the student "
                f"has no more (it has {self.version}): the batch cannot be ended"
            )
        self._announcements.say(WeightsWanted(engine))
        self._give(engine, everywhere=False)

    def _give(self, engine: str, *, everywhere: bool) -> None:
        """Push the student's weights to all replicas, or to those that were started again. Called by all of the
        student's ranks; a replica that is lost meanwhile gets them when it is there again."""
        assert self.student is not None
        settings = self.config.engines[engine]
        decoder, dtype = self.student.decoder, DTYPES[settings.dtype or self.model.dtype]
        shards: fp8.Shards = partial(export_shards, decoder, dtype)
        weights = manifest(decoder.spec, dtype)
        if settings.quantization:
            shards, weights = fp8.quantised(shards, weights, group=self.groups.world, device=platform.device())
        while True:
            pool = self.engines.client(engine) if self.engines else None
            targets = pool.targets(everywhere=everywhere) if pool else []
            try:
                deliver(
                    shards,
                    weights,
                    version=self.version,
                    store=dist.PrefixStore(f"weights/{engine}", self.store),
                    group=self.groups.world,
                    device=platform.device(),
                    targets=targets,
                    bucket_bytes=settings.bucket_bytes,
                    checksums=settings.checksums,
                    shm_prefix=self.shm_prefix,
                    deadline_s=settings.start_timeout_s + settings.request_timeout_s,
                )
            except (TransferError, RolloutError):
                if not self._replicas_were_lost(pool, settings.hang_timeout_s * settings.replicas):
                    raise
            else:
                if pool:
                    pool.given(targets)
                return

    def _replicas_were_lost(self, pool: Pool | None, patience_s: float) -> bool:
        """After a push that failed, on all ranks: whether it did because a replica was lost, so that another can do
        better. Rank 0 knows."""
        board = StoreBoard(
            dist.PrefixStore("weights/again", self.store),
            "verdict",
            rank=self.rank,
            num_ranks=self.groups.grid.size,
            deadline_s=patience_s + _VERDICT_S,
        )
        try:
            if pool:
                board.publish("again", b"1" if pool.check() else b"0")
            return board.await_key("again", "rank 0 to look after the engines") == b"1"
        finally:
            board.leave(["again"])

    def score(
        self, rewards: Sequence[AnyReward], samples: Sequence[Sample], *, num_prompts: int, skipped_before: int
    ) -> Settled:
        """What the rewards say of responses; on rank 0. What failed is told, and counted for `reward_failures`."""
        assert self.rewards is not None
        found = self.rewards.score(rewards, samples)
        settled = settle(rewards, found, samples, num_prompts=num_prompts, skipped_before=skipped_before)
        counts = {f"failed/{name}": float(count) for name, count in settled.failed.items()}
        for name, count in (counts | {"skipped": float(settled.num_skipped)}).items():
            self._failed[name] = self._failed.get(name, 0.0) + count
        if settled.words:
            self.note(settled.words, kind="reward", level="warning")
        return settled

    def reward_failures(self) -> dict[str, float]:
        """Counts since the last call; empty on ranks that do not score, and where nothing failed."""
        counts, self._failed = {name: count for name, count in self._failed.items() if count}, {}
        return counts

    def share(self, mine: Chunk | None, deadline_s: float) -> Chunk:
        """Rank 0's chunk on every rank. The others wait in the store for at most the deadline."""
        if self.rank == 0:
            assert mine is not None
            self._announcements.say(mine)
            return mine
        while True:
            match self._announcements.hear(deadline_s):
                case WeightsWanted(engine):
                    if self.student is not None:
                        self._give(engine, everywhere=False)
                case Order() as order:  # to end, in place of the chunk
                    raise Ended(order)
                case Chunk() as chunk:
                    return chunk

    def say_order(self, order: Order) -> None:
        """On rank 0, at the end of a step, or in place of a chunk."""
        self._announcements.say(order)

    def hear_order(self) -> Order:
        """On every other rank, at the end of a step."""
        order = self._announcements.hear(self.config.collective_timeout_s)
        assert isinstance(order, Order)
        return order

    def export(self, target: Path) -> None:
        dtype = DTYPES[self.model.dtype]
        total = sum(map(nbytes, manifest(self.spec, dtype)))
        with self.board.task("export", total, "bytes") as task:
            export_folder(self.trained.decoder, self.model.path, target, dtype, advance=task.advance)

    def begin(self, stage: int, step: int) -> None:
        """A step of a stage begins."""
        if self.records is not None:
            settings = self.config.stages[stage]
            self.records.begin(settings.kind, stage, step, settings.steps)

    @property
    def board(self) -> Board:
        """Where this rank shows how far something long is; rank 0's is seen."""
        return self.records.board if self.records is not None else Board()

    def report(
        self,
        stage: int,
        step: int,
        values: dict[str, float],
        *,
        update: int | None = None,
        phases: Phases | None = None,
    ) -> None:
        """What a step has to say, into the records that rank 0 keeps."""
        if self.records is not None:
            settings = self.config.stages[stage]
            self.records.report(settings.kind, stage, step, settings.steps, values, update=update, phases=phases)
            if self.stopping is not None:
                self.stopping.observe(values)

    def note(self, words: str, *, kind: str = "note", level: Level = "info") -> None:
        """Something else than a figure: onto the console and into events.jsonl."""
        if self.records is not None:
            self.records.note(words, kind=kind, level=level)

"""The steps of a run's stages, and what is kept of them: `Progress` counts, saves, ends and goes on.

The moment after a step's update, with everything that the next one goes on from, is marked in memory (numbers and
text; the weights are the student's own). A checkpoint is written of the last moment: at the end of a step, or, when a
batch is given up, of the step before it: weights have not moved since. So data, factors and random states are those of
the weights, whenever a save is asked for.

Before an evaluation there is a moment of its own: a run that ends in one saves that it is still to be done. A stage
that a figure ends (stopping.py) is evaluated a last time, and its moment says that it is over. Every rank of the world
goes through here in the same order; those without a part of the student save nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_dgrpo import points
from megatron_dgrpo.checkpoint.manifest import OPTIMIZER, Manifest
from megatron_dgrpo.checkpoint.training import Saver, load_training
from megatron_dgrpo.errors import CheckpointError
from megatron_dgrpo.observe.environment import environment
from megatron_dgrpo.parallel.rng import random_states, restore_random_states, to_text
from megatron_dgrpo.train.evaluation import evaluate, is_due
from megatron_dgrpo.train.orders import Ended, Order
from megatron_dgrpo.train.resuming import Resumed
from megatron_dgrpo.train.run import Run
from megatron_dgrpo.train.stopping import Stopping


class Kept(Protocol):
    """A part of a stage that has a state."""

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Moment:
    """After a step of a stage."""

    stage: int
    step: int
    evaluated: bool
    version: int
    updates: int
    made: int  # of them, the others were skipped
    parts: Mapping[str, Any]
    positions: Mapping[str, int]
    random: dict[str, torch.Tensor]
    score: float | None = None
    over: bool = False  # no step of the stage follows


class Progress:
    """Of one rank. `identities` are what the run is made with (checkpoint/identity.py)."""

    def __init__(self, run: Run, resumed: Resumed, identities: Mapping[str, str]) -> None:
        self._run, self._resumed, self._identities = run, resumed, identities
        self._settings = run.config.checkpoints
        self._now: Moment | None = None
        self._parts: Mapping[str, Kept] = {}
        self._saver: Saver | None = None
        if run.student is not None:
            self._saver = Saver(
                run.student.decoder,
                run.config.run_dir,
                run.model.path,
                keep_last=self._settings.keep_last,
                keep_best=self._settings.keep_best,
                asynchronous=self._settings.asynchronous,
            )
        if resumed.trainer is not None:
            run.version = int(resumed.trainer["version"])
        self._written = run.version  # what the newest checkpoint has
        self._writing: Moment | None = None
        self._saved_at = time.monotonic()
        self._versions: dict[str, str] = environment()["versions"] if run.rank == 0 else {}

    @property
    def first_stage(self) -> int:
        return self._resumed.stage

    # ---- the steps ----

    def steps(self, number: int, parts: Mapping[str, Kept], rehearsal: Callable[[], None]) -> Iterator[int]:
        """A stage's steps from where it stands, with its evaluations. `parts` are what has a state there; the rehearsal
        comes before all else where steps are left."""
        stage = self._run.config.stages[number]
        stopping = self._run.stopping = Stopping(stage.stop_when)
        self._parts = {**parts, **({"stopping": stopping} if stage.stop_when else {})}
        step, evaluated, over = self._enter(number)
        if stage.dry_batch and step < stage.steps and not over:
            rehearsal()
        self._mark(number, step, evaluated=evaluated, over=over)
        if not evaluated and (over or is_due(self._run, number, step)):
            self._evaluate(number, step, over=over)
        if over or (stage.stop_when and self._agreed_over(number, step)):
            return
        for following in range(step + 1, stage.steps + 1):
            points.reached("step.begin")
            yield following
            points.reached("step.end")
            self._mark(number, following, evaluated=False)
            self._evaluate_if_due(number, following)
            order = self._order(last=following == stage.steps)
            if order.over:
                self._end_stage(number, following, evaluate_first=not order.end)
            self._follow(order)
            if order.over:
                return
        if unseen := stopping.unseen:
            self._run.note(f"no record of stage {number} had {unseen}, which stop_when names", level="warning")

    def _evaluate_if_due(self, number: int, step: int) -> None:
        if is_due(self._run, number, step):
            self._evaluate(number, step)
        else:
            self._mark(number, step, evaluated=True)

    def _evaluate(self, number: int, step: int, *, over: bool = False) -> None:
        score = evaluate(self._run, number, step)
        self._mark(number, step, evaluated=True, score=score, over=over)

    # ---- a stage that a figure ends ----

    def _agreed_over(self, number: int, step: int) -> bool:
        """Before the first step that this process would make: what the evaluation there says."""
        run = self._run
        if run.waiting is None:
            over = run.hear_order().over
        else:
            over = run.stopping is not None and run.stopping.over
            run.say_order(Order(over=over))
        if over:
            self._end_stage(number, step, evaluate_first=True)
        return over

    def _end_stage(self, number: int, step: int, *, evaluate_first: bool) -> None:
        """Mark that it is over, after its last evaluation. A run that is told to end leaves that to be done."""
        run, now, settings = self._run, self._now, self._run.config.stages[number]
        assert now is not None and run.stopping is not None
        run.note(
            f"stage {number} ({settings.kind}) is over after step {step} of {settings.steps}: {run.stopping.reason}",
            kind="stage over",
        )
        done = is_due(run, number, step) or run.config.evaluation is None
        if evaluate_first and not done:
            self._evaluate(number, step, over=True)
        else:
            self._now = replace(now, evaluated=done, over=True)

    def _mark(self, number: int, step: int, *, evaluated: bool, score: float | None = None, over: bool = False) -> None:
        run = self._run
        self._now = Moment(
            stage=number,
            step=step,
            evaluated=evaluated,
            version=run.version,
            updates=run.student.updates if run.student is not None else 0,
            made=run.student.made if run.student is not None else 0,
            parts={name: part.state() for name, part in self._parts.items()},
            positions=run.records.positions() if run.records is not None else {},
            random=random_states(),
            score=score,
            over=over,
        )
        if run.waiting is not None and run.version > self._written:
            run.waiting.requests.unsaved = True

    # ---- deciding ----

    def _order(self, *, last: bool) -> Order:
        """At the end of a step: what rank 0 says."""
        run, now, settings = self._run, self._now, self._settings
        assert now is not None
        if run.waiting is None:
            return run.hear_order()
        self._look_after_the_write()
        wanted = run.waiting.requests
        over = run.stopping is not None and run.stopping.over
        due = settings.every > 0 and (now.step % settings.every == 0 or last or over)
        due |= settings.every_s is not None and time.monotonic() - self._saved_at >= settings.every_s
        order = Order(
            save=(due or wanted.save or wanted.end) and now.version > self._written, end=wanted.end, over=over
        )
        if wanted.save:
            wanted.saved()
        run.say_order(order)
        return order

    def _follow(self, order: Order) -> None:
        if order.end:
            raise Ended(order)
        if order.save:
            self._save()

    def end(self, ended: Ended) -> None:
        """Every rank's answer to `Ended`, wherever it was raised: save what is not saved yet."""
        order = ended.order
        if order is None:
            order = Order(save=self._now is not None and self._now.version > self._written, end=True)
            self._run.say_order(order)
        if order.save:
            self._save()
        self.finish()
        self._run.note("ended, as it was told to; started again with the same run_dir it goes on", kind="end early")

    # ---- writing ----

    def _save(self) -> None:
        self.finish()
        now, run = self._now, self._run
        assert now is not None
        if self._saver is None or run.student is None:
            return
        if run.records is not None:
            run.records.sync()
        world = run.groups.world
        everyone: list[Any] = [None] * dist.get_world_size(world)
        dist.all_gather_object(everyone, to_text(now.random), group=world)
        trainer = {
            "stage": now.stage,
            "step": now.step,
            "evaluated": now.evaluated,
            "version": now.version,
            "updates": now.updates,
            "made": now.made,
            "parts": dict(now.parts),
            "positions": dict(now.positions),
            "score": now.score,
            "over": now.over,
            "random": everyone,
        }
        manifest = Manifest(now.stage, now.step, self._identities, {}, versions=self._versions, score=now.score)
        self._writing = replace(now, random={})
        self._saver.save(run.student.optimizer if now.made else None, trainer, manifest)
        self._written, self._saved_at = now.version, time.monotonic()

    def _look_after_the_write(self) -> None:
        if self._saver is not None and not self._saver.busy:
            self.finish()

    def finish(self) -> None:
        """Wait for a write that was begun, and tell how it went."""
        if self._saver is None or self._writing is None:
            return
        saved, moment, self._writing = self._saver.wait(), self._writing, None
        run = self._run
        if saved is None or saved.failure:
            why = saved.failure if saved else "its thread ended; see the ranks' logs"
            run.note(f"no checkpoint was written, training goes on: {why}", kind="checkpoint", level="warning")
            self._written = -1  # the next order to save is for it, too
            return
        if run.waiting is not None and moment.version == run.version:
            run.waiting.requests.unsaved = False
        run.note(
            f"checkpoint {saved.target.name}: {saved.num_bytes:,} bytes in {saved.total_s:.2f} s; training waited "
            f"{saved.blocked_s:.2f} s",
            kind="checkpoint",
        )
        if saved.warning:
            run.note(saved.warning, kind="checkpoint", level="warning")

    # ---- going on ----

    def _enter(self, number: int) -> tuple[int, bool, bool]:
        """The last step that was made of a stage, whether it was evaluated, and whether the stage was over."""
        trainer, folder = self._resumed.trainer, self._resumed.folder
        if trainer is None or folder is None or number != self._resumed.stage:
            return 0, False, False
        run = self._run
        for name, part in self._parts.items():  # ranks of a teacher alone read static data, too
            if name in trainer["parts"]:  # a setting that came later has no state there
                part.restore(trainer["parts"][name])
        if run.student is not None:
            self._load(folder, trainer)
            states = trainer["random"]
            if len(states) == run.groups.grid.size:  # another layout draws anew
                restore_random_states(states[dist.get_rank(run.groups.world)])
        return int(trainer["step"]), bool(trainer["evaluated"]), bool(trainer["over"])

    def _load(self, folder: Any, trainer: Mapping[str, Any]) -> None:
        student, updates, made = self._run.trained, int(trainer["updates"]), int(trainer["made"])
        lacking = made and not (folder / OPTIMIZER).is_dir()
        if lacking and "optimizer" not in self._run.config.resume.allow:
            raise CheckpointError(
                f"{folder} has no optimizer state, after {made} updates: moments would begin at zero. Go on with "
                "another checkpoint, or set resume.allow=[optimizer]"
            )
        points.reached("resume")
        load_training(student.decoder, student.optimizer if made and not lacking else None, folder)
        student.resume(0 if lacking else updates, 0 if lacking else made)
        points.reached("load")

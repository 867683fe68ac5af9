"""The kinds of stages. Stages of static data learn from answers that the data have; those of rollouts from what the
student says.

    sft     negative log-likelihood of the answers
    kd      divergence to a teacher on the answers' tokens, and likelihood where a coefficient says so
    dgrpo   surrogate of rewards and divergence to a teacher, on rollouts
    grpo    the first part alone
    opd     the second part alone

The three of rollouts are one algorithm with more or fewer terms (`OnPolicy`): they differ in the sections that they
have, and in nothing that comes after the config.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.data import Dataset
from megatron_dgrpo.config.endings import OnNonFinite, StopConditions, StopOnNonFinite
from megatron_dgrpo.config.frozen import Frozen
from megatron_dgrpo.config.mismatch import Mismatch
from megatron_dgrpo.config.objective import GRPOObjective, KDObjective, Objective, OPDObjective, RolloutObjective
from megatron_dgrpo.config.optimizer import Adam
from megatron_dgrpo.config.rewards import Reward
from megatron_dgrpo.config.sampling import Sampling
from megatron_dgrpo.config.selection import DynamicSampling, Filter


class Stage(Frozen):
    data: Dataset
    steps: NonNegativeInt
    """Batches to train on."""
    optimizer: Adam
    micro_batch_tokens: PositiveInt = 8192
    """Sequences are packed into micro-batches of at most so many tokens (on all context-parallel ranks together). A
    prompt counts once for all of its responses; a group that is larger is cut into several, each with the prompt."""
    on_overlong: Literal["error", "drop"] = "error"
    """A sequence that is longer than a micro-batch or the model's context ends the run, or is dropped and counted."""
    on_nonfinite: OnNonFinite = StopOnNonFinite()
    """What happens when a loss token or the gradient's norm is NaN or infinite, before the update: stop, or skip; a
    kind's name alone, or a mapping with its settings. Either way stage, step, rank and sample are named."""
    dry_batch: bool = True
    """Before the first step, go through a batch of the greatest lengths that the stage has, without an update: what
    does not fit into memory ends the run there, and not after hours."""
    stop_when: StopConditions = ()
    """Any of these ends the stage at the end of a step, before its last one; the next stage follows."""

    @property
    def num_updates(self) -> int:
        """Of the optimizer."""
        return self.steps

    @property
    def uses_teacher(self) -> bool:
        return False


class Static(Stage):
    """A stage that learns from the data's answers."""

    steps: NonNegativeInt = 0
    """Batches to train on; left out beside epochs."""
    batch_size: PositiveInt | None = None
    """Examples a step."""
    batch_tokens: PositiveInt | None = None
    """Tokens a step, of prompts and answers, in place of batch_size: a batch ends with the example that reaches it."""
    epochs: PositiveFloat | None = None
    """How often each row is seen, in place of steps, which the run then counts: as many as the rows fill, the last one
    with rows of the next epoch. Not of streams and mixtures, which have no length."""


class SFT(Static):
    """Supervised fine-tuning: negative log-likelihood of the answers, a mean over the batch's answer tokens."""

    kind: Literal["sft"]


class KD(Static):
    """Distillation on static data: the teacher's distributions at the answers' tokens."""

    kind: Literal["kd"]
    objective: KDObjective = KDObjective()
    preflight: bool = True
    """Before the first update, check on its batch that the teacher's signal arrives and is the right one; the cost is
    about a forward of the teacher. A failed check ends the run."""
    diagnostics_every: NonNegativeInt = 50
    """Compare the norms and directions of the terms' gradients at the first step and every so many (0: never)."""

    @property
    def uses_teacher(self) -> bool:
        return self.objective.uses_teacher

    @property
    def preflights(self) -> bool:
        """Whether the first update is checked."""
        return self.uses_teacher and self.preflight


class Synchronous(Frozen):
    """Generate the whole batch, then train on it: the engine waits for the trainer, and the trainer for the engine."""

    kind: Literal["synchronous"] = "synchronous"


class Periodic(Frozen):
    """Train on groups that have ended while others still generate, and update once all have: the gradient is the
    synchronous schedule's, and every sample is from the weights that it changes."""

    kind: Literal["periodic"] = "periodic"
    chunk_groups: PositiveInt = 4
    """Train when so many groups have ended, or all. A group is a prompt's responses; each data-parallel rank should
    get some."""
    groups_in_memory: PositiveInt = 64
    """Groups that have ended and wait for the trainer; more wait on the disk, in the journal. No chunk is larger."""


def _schedule(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Schedule = Annotated[Synchronous | Periodic, Field(discriminator="kind"), BeforeValidator(_schedule)]
GroupSize = Annotated[int, Field(ge=2)]
SomeRewards = Annotated[tuple[Reward, ...], Field(min_length=1)]


class OnPolicy(Stage):
    """Rollouts, rewards, teacher, update, weight transfer."""

    engine: str
    """Name of the engine that generates."""
    prompts_per_step: PositiveInt
    """Prompts of a batch, each with `group_size` responses."""
    group_size: PositiveInt
    """Responses per prompt (G)."""
    schedule: Schedule = Synchronous()
    """How generating and training follow each other; a kind's name alone, or a mapping with its settings."""
    updates_per_batch: PositiveInt = 1
    """Optimizer updates per batch of rollouts; each takes an equal share of the prompts."""
    epochs_per_batch: PositiveInt = 1
    """How often a batch of rollouts is gone through, in the same shares; the old log-probs stay those of its
    beginning."""
    sampling: Sampling
    rewards: tuple[Reward, ...]
    objective: RolloutObjective
    mismatch: Mismatch = Mismatch()
    """What is done where the trainer's log-probs of the sampled tokens differ from the engine's."""
    diagnostics_every: NonNegativeInt = 50
    """Compare the norms and directions of the terms' gradients at the first step and every so many (0: never)."""

    @property
    def updates_per_step(self) -> int:
        return self.updates_per_batch * self.epochs_per_batch

    @property
    def num_updates(self) -> int:
        return self.steps * self.updates_per_step

    @property
    def uses_teacher(self) -> bool:
        return self.objective.uses_teacher

    @property
    def preflights(self) -> bool:
        """Whether the first update is checked."""
        return self.uses_teacher and bool(getattr(self, "preflight", False))


class Selective(OnPolicy):
    """A stage whose rewards may choose its prompts."""

    filter: Filter | None = None
    """Pass over prompts that were always or never solved (none: ask for all)."""
    dynamic_sampling: DynamicSampling | None = None
    """Generate again, with further prompts, where the rewards of a group are all equal (none: such groups stay)."""


class DGRPO(Selective):
    """Rewards and a teacher."""

    kind: Literal["dgrpo"]
    group_size: GroupSize
    """Responses per prompt (G)."""
    rewards: SomeRewards
    objective: Objective = Objective()
    preflight: bool = True
    """Before the first update, check on its batch that the teacher's signal arrives and is the right one; the cost is
    about a forward of the teacher. A failed check ends the run."""


class GRPO(Selective):
    """Rewards alone."""

    kind: Literal["grpo"]
    group_size: GroupSize
    """Responses per prompt (G)."""
    rewards: SomeRewards
    objective: GRPOObjective = GRPOObjective()


class OPD(OnPolicy):
    """A teacher alone."""

    kind: Literal["opd"]
    group_size: PositiveInt = 1
    """Responses per prompt (G)."""
    rewards: tuple[Reward, ...] = ()
    """Are reported, and not learnt from."""
    objective: OPDObjective = OPDObjective()
    preflight: bool = True
    """Before the first update, check on its batch that the teacher's signal arrives and is the right one; the cost is
    about a forward of the teacher. A failed check ends the run."""


AnyStage = SFT | KD | DGRPO | GRPO | OPD

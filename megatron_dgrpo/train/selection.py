"""Which prompts a step asks for, and which of their groups it trains on: filtering and dynamic sampling.

Rank 0 alone takes rows and sees every group, also those that are left out; the other ranks get what it publishes, and
their own state says nothing. A visit changes the filter at the end of its step, in the order in which the prompts were
asked for: what is passed over does not depend on which groups ended first, and a step that is begun again from a
checkpoint finds the filter as it was.

The data's place counts every prompt that was drawn: asked for, asked for and replaced, or passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_dgrpo.config.schema import OnPolicy, Selective
from megatron_dgrpo.config.selection import Filter
from megatron_dgrpo.data.dataset import PromptSource
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.errors import DataError, RolloutError
from megatron_dgrpo.rewards.compose import total
from megatron_dgrpo.rollout.messages import Group

_STREAM_PASSES = 10
"""Of a stream, whose length is unknown: rows that are passed over without a break, in multiples of those left out."""


def rounds(stage: OnPolicy) -> int:
    """Generations of a step at most."""
    return stage.dynamic_sampling.rounds if isinstance(stage, Selective) and stage.dynamic_sampling else 1


class Selection:
    """Of one stage."""

    def __init__(self, stage: OnPolicy, prompts: PromptSource) -> None:
        self._stage, self._prompts = stage, prompts
        self._filter: Filter | None = stage.filter if isinstance(stage, Selective) else None
        self._dynamic = stage.dynamic_sampling if isinstance(stage, Selective) else None
        self._streaks: dict[str, int] = {}
        """Row -> visits in a row at which it was always solved, or minus those at which it never was."""
        self._asked: list[str] = []
        self._seen: dict[str, tuple[float, float]] = {}
        """Prompt -> the least and the largest reward of its responses, in this step."""
        self._facts: dict[str, float] = {}

    def state(self) -> Mapping[str, Any]:
        return {"streaks": dict(self._streaks)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._streaks = dict(state["streaks"])

    @property
    def facts(self) -> dict[str, float]:
        """For the step's record, on rank 0."""
        return self._prompts.facts() | self._facts

    def first(self) -> list[PromptRow]:
        """A step begins: its prompts, as far as is known yet."""
        self._asked, self._seen, self._facts = [], {}, {}
        if self._filter is not None:
            left_out = [streak for streak in self._streaks.values() if self._is_out(streak)]
            self._facts = {"filter/passed_over": 0.0, "filter/always": float(sum(streak > 0 for streak in left_out))}
            self._facts["filter/never"] = len(left_out) - self._facts["filter/always"]
        return self._take(self._stage.prompts_per_step)

    def see(self, group: Group) -> Group:
        """Every group that was scored comes through here."""
        if rewards := self._rewards(group):
            self._seen[group.prompt_id] = min(rewards), max(rewards)
        return group

    def in_order(self, groups: Iterable[Group]) -> tuple[Group, ...]:
        """In that of their prompts."""
        place = {name: number for number, name in enumerate(self._asked)}
        return tuple(sorted(groups, key=lambda group: place[group.prompt_id]))

    def batch(self, first: Sequence[PromptRow], generate: Callable[[Sequence[PromptRow]], list[Group]]) -> list[Group]:
        """The groups of a whole step; with dynamic sampling in as many rounds as it takes."""
        if self._dynamic is None:
            return generate(first)
        size, rows = len(first), first
        taken: list[Group] = []
        others: list[Group] = []
        for number in range(1, self._dynamic.rounds + 1):
            for group in self.in_order(generate(rows)):
                (taken if self._differs(group) else others).append(group)
            if len(taken) == size or number == self._dynamic.rounds:
                break
            rows = self._take(size - len(taken))
        if len(taken) < size:
            if self._dynamic.when_short == "stop":
                raise RolloutError(
                    f"{len(taken)} of {size} groups have responses of different rewards, after {number} rounds of "
                    f"generation and {len(self._asked)} prompts: take prompts that are neither too hard nor too easy, "
                    "raise group_size or dynamic_sampling.rounds, or set dynamic_sampling.when_short=fill"
                )
            filling = sorted(others, key=lambda group: not group.responses)[: size - len(taken)]
            taken += filling
        kept = {group.prompt_id for group in taken}
        wasted = [group for group in others if group.prompt_id not in kept]
        self._facts |= {
            "sampling/rounds": float(number),
            "sampling/dropped": len(wasted) / len(self._asked),
            "sampling/wasted_tokens": float(sum(t.num_loss_tokens for group in wasted for t in group.trajectories)),
        }
        return taken

    def done(self) -> None:
        """All groups of the step have come: what their prompts' visits say of them."""
        if self._filter is None:
            return
        for name in self._asked:
            if name in self._seen:
                self._visit(_row(name), *self._seen[name])

    def _visit(self, row: str, least: float, largest: float) -> None:
        assert self._filter is not None
        if least >= self._filter.always:
            self._streaks[row] = max(0, self._streaks.get(row, 0)) + 1
        elif largest <= self._filter.never:
            self._streaks[row] = min(0, self._streaks.get(row, 0)) - 1
        else:
            self._streaks.pop(row, None)

    def _is_out(self, streak: int) -> bool:
        return self._filter is not None and abs(streak) >= self._filter.visits

    def _take(self, count: int) -> list[PromptRow]:
        rows: list[PromptRow] = []
        passed = 0
        while len(rows) < count:
            (row,) = self._prompts.take(1)
            if not self._is_out(self._streaks.get(_row(row.name), 0)):
                rows.append(row)
                passed = 0
                continue
            self._facts["filter/passed_over"] += 1
            passed += 1
            self._check_left(passed)
        self._asked += [row.name for row in rows]
        return rows

    def _check_left(self, passed: int) -> None:
        """Some row is left, or is likely to be."""
        out = sum(map(self._is_out, self._streaks.values())) if passed == 1 or passed % 1000 == 0 else 0
        known = self._prompts.num_rows
        if out and (out >= known if known is not None else passed >= _STREAM_PASSES * out):
            raise DataError(
                f"filter leaves no prompt: all {out} were always or never solved at their last visits. End the stage "
                "earlier (steps, stop_when), give it more data, or raise filter.visits"
            )

    def _rewards(self, group: Group) -> list[float]:
        return [total(self._stage.rewards, response.rewards) for response in group.responses]

    def _differs(self, group: Group) -> bool:
        """Whether its responses have an advantage. A group that a reward failed on has none."""
        return len(set(self._rewards(group))) > 1


def _row(name: str) -> str:
    """A row's own name, without the epoch."""
    return name.rpartition("@")[0]

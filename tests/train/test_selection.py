"""Prompts that are passed over, and groups that are replaced: by hand, and in real runs that go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_stopping import _hash, _run

from megatron_dgrpo.checkpoint.manifest import checkpoints
from megatron_dgrpo.config.data import Dataset
from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.schema import GRPO
from megatron_dgrpo.data.dataset import PromptSource
from megatron_dgrpo.errors import ConfigError, DataError, RolloutError
from megatron_dgrpo.packing.trajectory import Segment
from megatron_dgrpo.rollout.journal import Began, Further, Journal, Trained, read_step
from megatron_dgrpo.rollout.messages import Group, Response
from megatron_dgrpo.train.selection import Selection

SIZE = 3


def _source(folder: Path, rows: int) -> PromptSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": "a"}) + "\n" for i in range(rows)))
    return PromptSource(Dataset(path=str(path)), seed=0)


def _selection(folder: Path, rows: int, **settings: Any) -> Selection:
    stage = GRPO.model_validate(
        {
            "kind": "grpo",
            "data": {"path": "none"},
            "engine": "rollout",
            "steps": 1,
            "prompts_per_step": SIZE,
            "group_size": 2,
            "sampling": {"max_tokens": 4},
            "rewards": [{"kind": "exact_match", "weight": 2.0}],
            "optimizer": {"lr": 1e-3},
        }
        | settings
    )
    return Selection(stage, _source(folder, rows))


def _group(name: str, rewards: Sequence[float], length: int = 3) -> Group:
    tokens = np.zeros(length, np.int32)
    segment = Segment(tokens, True, np.zeros(length, np.float32), weight_versions=tokens)
    responses = [Response(i, i, (segment,), "stop", {"exact_match": r / 2}) for i, r in enumerate(rewards)]
    return Group(name, np.zeros(2, np.int32), tuple(responses))


def _step(selection: Selection, rewards: Mapping[str, Sequence[float]]) -> list[str]:
    """A step in which each row, by its number, has these rewards; the rows that it asked for."""
    asked: list[str] = []

    def generate(rows: Any) -> list[Group]:
        asked.extend(row.prompt for row in rows)
        return [selection.see(_group(row.name, rewards[row.prompt])) for row in reversed(rows)]

    selection.batch(selection.first(), generate)
    selection.done()
    return asked


ALWAYS, NEVER, MIXED = (2.0, 2.0), (0.0, 0.0), (0.0, 2.0)


def test_prompts_that_were_always_or_never_solved_at_their_last_visits_are_passed_over(tmp_path: Path) -> None:
    selection = _selection(tmp_path, 6, filter={"visits": 2, "always": 2.0})
    rewards = {"p0": ALWAYS, "p1": NEVER, "p2": MIXED, "p3": (1.0, 1.0), "p4": ALWAYS, "p5": MIXED}
    for _ in range(2):  # epochs
        assert sorted(_step(selection, rewards) + _step(selection, rewards)) == sorted(rewards)
        assert selection.facts == {"filter/passed_over": 0.0, "filter/always": 0.0, "filter/never": 0.0}
    kept = selection.state()
    seen = [*_step(selection, rewards), *_step(selection, rewards)]
    assert sorted(set(seen)) == ["p2", "p3", "p5"], "equal rewards between the two are neither"
    assert selection.facts["filter/always"] == 2.0 and selection.facts["filter/never"] == 1.0
    again = _selection(tmp_path, 6, filter={"visits": 2, "always": 2.0})
    again._prompts.take(12)
    again.restore(json.loads(json.dumps(kept)))
    assert [*_step(again, rewards), *_step(again, rewards)] == seen and again.facts == selection.facts


def test_one_other_visit_begins_the_count_anew(tmp_path: Path) -> None:
    selection = _selection(tmp_path, 3, filter={"visits": 2, "always": 2.0})
    for of_p0 in (NEVER, ALWAYS, MIXED, NEVER, (0.0, 0.5)):
        assert sorted(_step(selection, {"p0": of_p0, "p1": MIXED, "p2": MIXED})) == ["p0", "p1", "p2"]
    assert selection.state() == {"streaks": {}}
    _step(selection, {"p0": (), "p1": ALWAYS, "p2": MIXED})  # a reward failed: no visit
    assert list(selection.state()["streaks"].values()) == [1]


def test_a_filter_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    selection = _selection(tmp_path, 6, filter={"visits": 1, "always": 2.0})
    solved = {f"p{i}": ALWAYS for i in range(6)}
    _step(selection, solved)
    _step(selection, solved)
    with pytest.raises(DataError, match="filter leaves no prompt: all 6 were always or never solved"):
        _step(selection, solved)


def _batch(selection: Selection, rounds: list[list[Sequence[float]]]) -> tuple[list[Group], list[int]]:
    """What is taken of so many generations with these rewards, in the order asked; and how many each asked for."""
    asked: list[int] = []

    def generate(rows: Any) -> list[Group]:
        found = rounds[len(asked)]
        asked.append(len(rows))
        return [_group(row.name, rewards) for row, rewards in zip(rows, found, strict=True)][::-1]

    return list(selection.in_order(selection.batch(selection.first(), generate))), asked


def _rewards_of(groups: Sequence[Group]) -> list[tuple[float, ...]]:
    return [tuple(2 * response.rewards["exact_match"] for response in group.responses) for group in groups]


def test_groups_of_equal_rewards_are_replaced_until_the_batch_is_full(tmp_path: Path) -> None:
    selection = _selection(tmp_path, 50, dynamic_sampling={"rounds": 5})
    groups, asked = _batch(selection, [[ALWAYS, MIXED, NEVER], [NEVER, ()], [(2.0, 1.0), MIXED]])
    assert asked == [3, 2, 2] and _rewards_of(groups) == [MIXED, (2.0, 1.0), MIXED]
    assert selection.facts == {"sampling/rounds": 3.0, "sampling/dropped": 4 / 7, "sampling/wasted_tokens": 3.0 * 6}
    assert selection._prompts.state()["sources"][0]["drawn"] == 7


def test_a_batch_that_stays_short_is_filled_or_ends_the_run(tmp_path: Path) -> None:
    rounds = [[(), MIXED, NEVER], [ALWAYS, NEVER]]
    selection = _selection(tmp_path, 50, dynamic_sampling={"rounds": 2})
    groups, _ = _batch(selection, rounds)
    assert _rewards_of(groups) == [MIXED, NEVER, ALWAYS], "the first ones that have responses"
    assert selection.facts["sampling/dropped"] == 2 / 5 and selection.facts["sampling/wasted_tokens"] == 6.0
    selection = _selection(tmp_path, 50, dynamic_sampling={"rounds": 2, "when_short": "stop"})
    with pytest.raises(RolloutError, match="1 of 3 groups have responses of different rewards, after 2 rounds"):
        _batch(selection, rounds)


def test_the_journal_knows_what_was_asked_for_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(Began(0, 1, 5, ("a", "b"), 2, 1))
    journal.append(_group("b", MIXED))
    journal.append(_group("a", NEVER))
    journal.further(Further(("c",)))
    assert not read_step(tmp_path, 0, 1).generated
    journal.append(_group("c", MIXED))
    journal.trained(Trained(1, 6, (("b", 0), ("b", 1), ("c", 0), ("c", 1))))
    journal.close()
    found = read_step(tmp_path, 0, 1)
    assert found.generated and found.finished and found.began.prompt_ids == ("a", "b", "c")
    assert [t.prompt_id for t in found.trajectories] == ["a", "a", "b", "b", "c", "c"]
    assert {t.prompt_id for t in found.untrained} == {"a"}


def _config(files: Path, folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    lines = (files / "task/train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stage = {
        "kind": "grpo",
        "data": {"path": str(folder / "rows.jsonl")},
        "engine": "rollout",
        "steps": 6,
        "prompts_per_step": SIZE,
        "group_size": 2,
        "sampling": {"max_tokens": 2},
        "rewards": [{"kind": "regex", "pattern": "v[0-3]"}],
        "optimizer": {"lr": 1e-3},
        "filter": {"visits": 2},
        "dynamic_sampling": {"rounds": 3},
    }
    return {
        "run_dir": str(run_dir),
        "models": {"student": {"path": str(files / "student"), "dtype": "float32", "layout": {"dp": 2}}},
        "student": "student",
        "engines": {"rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26}},
        "rollout": {"deterministic": True},
        "checkpoints": {"every": 1, "keep_last": 10},
        "stages": [stage | changes],
    }


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_selects_goes_on_from_a_checkpoint_with_the_same_batches(files: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "whole"
    figures = _run(tmp_path, _config(files, tmp_path, run_dir))
    assert len(figures) == 6 and all(r["groups"] == SIZE for r in figures)
    drawn = 0.0
    for record in figures:
        step = read_step(run_dir / "rollouts", 0, record["step"])
        asked = len(step.began.prompt_ids)
        assert step.generated and step.finished
        assert record["sampling/dropped"] == pytest.approx(1 - SIZE / asked)
        assert record["sampling/wasted_tokens"] == sum(t.num_loss_tokens for t in step.untrained)
        assert record["equal_groups"] == 0 or record["sampling/rounds"] == 3
        drawn += asked + record["filter/passed_over"]
    assert any(r["sampling/rounds"] > 1 for r in figures) and any(r["sampling/wasted_tokens"] for r in figures)
    newest, *_ = checkpoints(run_dir)
    assert _trainer(newest)["parts"]["data"]["sources"][0]["drawn"] == drawn
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "hf")
    for folder in checkpoints(again)[:3]:
        shutil.rmtree(folder)
    assert _trainer(checkpoints(again)[0])["parts"]["selection"]["streaks"]
    assert _run(tmp_path, _config(files, tmp_path, again)) == figures
    assert _hash(again) == _hash(run_dir)


def _trainer(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "trainer.json").read_text(encoding="utf-8")))


def test_what_cannot_be_selected_is_refused(files: Path, tmp_path: Path) -> None:
    changes = {"schedule": "periodic", "filter": {"never": 1.0}, "rewards": [{"kind": "exact_match", "weight": 0.0}]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_config(files, tmp_path, tmp_path / "run", **changes)), encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        from megatron_dgrpo.config.checks import check

        check(load(path))
    said = str(raised.value)
    assert "stages.0.dynamic_sampling: which groups are replaced is known when all have ended" in said
    assert "stages.0.filter.never: 1 is not below filter.always=1" in said
    assert "stages.0.filter: all rewards have weight 0" in said

"""A number that is not finite says where it was (stage, step, update, rank, sample), and changes nothing: the run ends,
or the update is left out to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_static_update import SIZES, _examples

from megatron_dgrpo.errors import NonFiniteError
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny
from megatron_dgrpo.train.nonfinite import _first_bad

BAD_ROW, OVERFLOW = float("nan"), 3e38
"""Weights of the third example's tokens: its rows are not finite; its rows are, and its gradient is not."""
LAYOUTS = [{"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"dp": 2}]


class _Stage:
    """Updates of one stage on one rank."""

    def __init__(self, folder: str, axes: dict[str, Any], on_nonfinite: Any) -> None:
        import torch

        from megatron_dgrpo.config.optimizer import Adam
        from megatron_dgrpo.config.schema import SFT
        from megatron_dgrpo.model.megatron_config import BuildOptions
        from megatron_dgrpo.packing.pack import Packing
        from megatron_dgrpo.packing.trees import documents
        from megatron_dgrpo.parallel.groups import Groups
        from megatron_dgrpo.train.nonfinite import Guard
        from megatron_dgrpo.train.student import load_student

        sizes = {name: size for name, size in axes.items() if name != "sequence_parallel"}
        groups = Groups(**({"tp": 1, "dp": 1} | sizes))
        groups.seed(0)
        options = BuildOptions(torch.float32, sequence_parallel=axes.get("sequence_parallel", False))
        self.student = load_student(folder, groups=groups, options=options)
        self.student.start_optimizer(Adam(lr=1e-2, warmup_steps=2, schedule="cosine"), 8)  # type: ignore[arg-type]
        settings = {"kind": "sft", "data": {"path": "none"}, "steps": 8, "batch_size": 5, "optimizer": {"lr": 1.0}}
        stage = SFT.model_validate(settings | {"on_nonfinite": on_nonfinite})
        self.notes: list[str] = []
        run: Any = SimpleNamespace(
            config=SimpleNamespace(stages=[stage]),
            trained=self.student,
            note=lambda words, **_: self.notes.append(words),
        )
        self.guard = Guard(run, stage, 0)
        self._examples = _examples()
        grown = documents(self._examples)
        packing = Packing(32, dp=sizes.get("dp", 1), multiple_of=sizes.get("tp", 1))
        self._layouts = packing.micro_batches(grown, rank=groups.grid.coordinate("dp"), cp_rank=0)

    def update(self, step: int, factor: float | None = None) -> dict[str, float]:
        from megatron_dgrpo.algorithms.build import sft_loss, sft_streams
        from megatron_dgrpo.packing.trees import name_of
        from megatron_dgrpo.train.update import Gradients, Work

        streams = sft_streams(self._examples).streams
        weights_N = streams.weights["nll"].clone()
        if factor is not None:
            weights_N[streams.sample_N == 2] = factor
        loss, factors = sft_loss()
        names = [name_of(example) for example in self._examples]
        work = Work(self._layouts, replace(streams, weights={"nll": weights_N}), loss, factors, 1.0, names=names)
        gradients, metrics = Gradients(self.student), {}
        gradients.add(work)
        with self.guard(gradients, [work], step):
            metrics = gradients.finish()
            metrics |= self.student.update()
        return metrics

    def bits(self) -> list[Any]:
        """The weights, the optimizer's state, and its groups' counts of steps, as they are now."""
        import torch

        def copied(value: Any) -> Any:
            return value.detach().clone() if isinstance(value, torch.Tensor) else value

        inner = [one.optimizer for one in self.student.optimizer.chained_optimizers]
        states = [value for optimizer in inner for state in optimizer.state.values() for value in state.values()]
        groups = [
            value
            for optimizer in inner
            for g in optimizer.param_groups
            for k, value in sorted(g.items())
            if k != "params"
        ]
        return [copied(value) for value in (*self.student.decoder.parameters(), *states, *groups)]


def _same(a: list[Any], b: list[Any]) -> bool:
    import torch

    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def _stopped(rank: int, world: int, folder: str) -> Any:
    said, same = [], True
    for factor in (BAD_ROW, OVERFLOW):
        stage = _Stage(folder, {"dp": 2}, "stop")
        before = stage.bits()
        try:
            stage.update(7, factor)
        except NonFiniteError as error:
            said.append(str(error))
        same = same and _same(before, stage.bits())
    return said, same


def test_all_ranks_stop_before_the_update_and_name_the_sample(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "student", tied=True, seed=1, **SIZES)
    ranks = run_distributed(_stopped, 2, str(folder))
    assert all(same and len(said) == 2 for said, same in ranks)
    assert ranks[0] == ranks[1], "all of them know the same"
    rows, norm = ranks[0][0]
    assert rows.startswith("stage 0 (sft), step 7, update 1: 7 loss rows are not finite; no weight was changed:\n")
    assert "sample 0 of prompt row2, position 3" in rows and "  - rank " in rows
    assert norm.startswith("stage 0 (sft), step 7, update 1: the gradient's norm is ")
    assert "sample 0 of prompt row2 is the first whose gradient alone is not finite" in norm
    assert "stages.0.on_nonfinite=skip" in rows and "stages.0.on_nonfinite=skip" in norm


def _skipped(rank: int, world: int, folder: str, axes: dict[str, Any]) -> Any:
    """A good update, three that are skipped, a good one; beside it the same without them."""
    found: dict[str, Any] = {}
    stage = _Stage(folder, axes, {"kind": "skip", "in_a_row": 4})
    found["first"] = bool(stage.update(1))
    before = stage.bits()
    found["records"] = [stage.update(2, BAD_ROW), stage.update(3, OVERFLOW), stage.update(4, BAD_ROW)]
    found["same"] = _same(before, stage.bits())
    found["state"], found["facts"] = stage.guard.state(), stage.guard.facts
    found["lr"] = stage.update(5)["lr"]
    found["in a row"] = stage.guard.state()["in_a_row"]
    found["moved"] = not _same(before, stage.bits())
    found["counts"] = stage.student.updates, stage.student.made
    without = _Stage(folder, axes, "stop")
    without.update(1)
    for _ in range(3):
        without.student.skip()
    found["expected lr"] = without.update(5)["lr"]
    found["as without"] = _same(stage.bits(), without.bits())
    found["notes"] = stage.notes
    return found


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_skipped_update_changes_no_bit_and_the_schedule_goes_on(tmp_path: Path, axes: dict[str, Any]) -> None:
    folder = save_tiny(tmp_path / "student", tied=True, seed=1, **SIZES)
    ranks = run_distributed(_skipped, 2, str(folder), axes)
    for found in ranks:
        assert found["first"] and found["same"] and found["moved"] and found["as without"]
        bad_rows, overflow, _ = found["records"]
        assert bad_rows == {} and "grad_norm" not in overflow
        assert found["state"] == {"skipped": 3, "in_a_row": 3} and found["facts"] == {"skipped_steps": 3.0}
        assert found["lr"] == found["expected lr"] and found["in a row"] == 0
        assert found["counts"] == (5, 2)
        rows, norm, _ = found["notes"]
        assert "7 loss rows" in rows and "sample 0 of prompt row2, position 3" in rows
        assert "skipped_steps 2, 2 in a row" in norm
        assert "sample 0 of prompt row2 is the first whose gradient alone is not finite" in norm
    assert ranks[0]["notes"] == ranks[1]["notes"]


def _too_often(rank: int, world: int, folder: str) -> str:
    stage = _Stage(folder, {}, {"kind": "skip", "in_a_row": 2})
    stage.update(1, BAD_ROW)
    stage.update(2)
    stage.update(3, BAD_ROW)
    try:
        stage.update(4, OVERFLOW)
    except NonFiniteError as error:
        return str(error)
    return ""


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "student", tied=True, seed=1, **SIZES)
    (said,) = run_distributed(_too_often, 1, str(folder))
    assert said.startswith("stage 0 (sft), step 4, ") and "2 updates in a row were not finite" in said
    assert "stages.0.on_nonfinite.in_a_row" in said


def test_the_first_of_several_is_found_and_what_is_bad_only_together() -> None:
    guilty = {3, 6}
    assert _first_bad(lambda some: bool(guilty & set(some)), range(8)) == range(3, 4)
    assert list(_first_bad(lambda some: {1, 2} <= set(some), range(4))) == [0, 1, 2, 3]
    assert list(_first_bad(lambda some: {4, 5} <= set(some), range(8))) == [4, 5]

"""A number that is not finite says where it was: stage, step, update, rank, sample; no weight is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_static_update import SIZES, _examples

from megatron_dgrpo.errors import NonFiniteError
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.tiny import save_tiny
from megatron_dgrpo.train.finite import finite


def test_the_place_is_put_before_what_was_found() -> None:
    with (
        pytest.raises(NonFiniteError, match=r"^stage 1 \(grpo\), step 3, update 2: the gradient's norm is nan"),
        finite("grpo", 1, 3, 2),
    ):
        raise NonFiniteError("the gradient's norm is nan")


def _spoilt(rank: int, world: int, folder: str) -> Any:
    import torch

    from megatron_dgrpo.algorithms.build import sft_loss, sft_streams
    from megatron_dgrpo.config.optimizer import Adam
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import documents, name_of
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student
    from megatron_dgrpo.train.update import Work, compute_gradients

    groups = Groups(tp=1, dp=2)
    groups.seed(0)
    student = load_student(folder, groups=groups, options=BuildOptions(torch.float32))
    student.start_optimizer(Adam(lr=1.0), 1)
    before = [p.detach().clone() for p in student.decoder.parameters()]
    examples = _examples()
    layouts = Packing(32, dp=2).micro_batches(documents(examples), rank=groups.grid.coordinate("dp"), cp_rank=0)
    streams = sft_streams(examples).streams
    said = []
    for factor in (float("nan"), 3e38):  # of the third example: a bad row; a row whose gradient overflows
        weights_N = streams.weights["nll"].clone()
        weights_N[streams.sample_N == 2] = factor
        loss, factors = sft_loss()
        names = [name_of(example) for example in examples]
        work = Work(layouts, replace(streams, weights={"nll": weights_N}), loss, factors, 1.0, names=names)
        try:
            with finite("sft", 0, 7):
                compute_gradients(student, work)
                student.update()
        except NonFiniteError as error:
            said.append(str(error))
    same = all(torch.equal(a, b) for a, b in zip(before, student.decoder.parameters(), strict=True))
    return said, same


def test_all_ranks_stop_before_the_update_and_one_names_the_sample(tmp_path: Any) -> None:
    folder = save_tiny(tmp_path / "student", tied=True, seed=1, **SIZES)
    ranks = run_distributed(_spoilt, 2, str(folder))
    assert all(same and len(said) == 2 for said, same in ranks)
    rows, norms = zip(*(said for said, _ in ranks), strict=True)
    assert all(text.startswith("stage 0 (sft), step 7, update 1: 7 loss rows are not finite") for text in rows)
    assert sum("sample 0 of prompt row2, position 3" in text for text in rows) == 1
    assert all(f"On rank {rank}" in text for rank, text in enumerate(rows))
    assert all(text.startswith("stage 0 (sft), step 7, update 1: ") for text in norms)

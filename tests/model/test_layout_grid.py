"""Logits and gradients of a cross-entropy at layouts in which every pair of settings meets, against transformers.

Which layouts these are is found by `testing.pairwise`: of up to 8 ranks, and of 16 where a pair needs them. Prompts are
shared by their responses, the vocabulary is not divisible, key-value heads are fewer than the ranks of tp=4, and the
longest sequences are beyond the original contexts of YaRN and Llama's scaling.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.testing import run_distributed
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole
from megatron_dgrpo.testing.pairwise import Case, pairwise
from megatron_dgrpo.testing.tiny import save_tiny
from megatron_dgrpo.testing.transformers_reference import as_reference, gradients_by_file_name

VOCABULARY, TEMPERATURE = 53, 0.8
SIZES = {"vocab_size": VOCABULARY, "hidden": 32, "head_dim": 16, "heads": 4, "kv_heads": 2, "intermediate": 48}
SIZES |= {"layers": 8, "std": 0.15, "random_norms": True}
ORIGINAL = {"original_max_position_embeddings": 12, "factor": 4.0}
LLAMA3 = ORIGINAL | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DENSE: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3", {"tied": True}),
    ("Qwen2", {"tied": False, "rope": ORIGINAL | {"rope_type": "yarn"}}),
    ("Llama", {"tied": True, "rope": LLAMA3}),
    ("Mistral", {"tied": False, "sliding_window": None}),
]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3Moe", {"tied": True, "norm_topk_prob": True, **EXPERTS}),
    ("Qwen3Moe", {"tied": False, **EXPERTS}),
]
PLAIN_GRID = {
    "tp": (1, 2, 4), "pp": (1, 2, 4), "vpp": (1, 2), "cp": (1, 2, 4), "dp": (1, 2), "sequence_parallel": (False, True),
    "recompute": ("none", "selective", "full"),
}  # fmt: skip
EXPERT_GRID = PLAIN_GRID | {"ep": (1, 2, 4), "etp": (1, 2)}
# Megatron's router takes its softmax in float32 whatever the type
DENSE64, MOE64, FLOAT32 = (torch.float64, 1e-12, 1e-11), (torch.float64, 1e-7, 1e-6), (torch.float32, 1e-5, 1e-4)
SP = {"sequence_parallel": True}
CORNERS = [  # beside the pairs: what a run would use
    (DENSE[0], {"tp": 2, "pp": 2, "cp": 2, **SP}, "selective", FLOAT32),
    (MOE[0], {"tp": 2, "cp": 2, "dp": 2, "ep": 4, **SP}, "full", FLOAT32),
]
CORNERS_OF_16 = [
    (DENSE[0], {"tp": 2, "pp": 2, "vpp": 2, "cp": 2, "dp": 2, **SP}, "full", DENSE64),
    (DENSE[1], {"tp": 4, "pp": 2, "cp": 2, **SP}, "selective", DENSE64),
    (MOE[0], {"tp": 2, "pp": 2, "vpp": 2, "cp": 2, "dp": 2, "ep": 4, "etp": 2, **SP}, "full", MOE64),
    (MOE[1], {"tp": 2, "pp": 2, "dp": 4, "ep": 4, **SP}, "none", MOE64),
]


def _world(case: Case) -> int:
    return case["tp"] * case["pp"] * case["cp"] * case["dp"]


def _can_be(case: Case, most: int) -> bool:
    """What `layout_problems` refuses, and more ranks than `most`, is not in the grid."""
    tp, sp = case["tp"], case["sequence_parallel"]
    if _world(case) > most or (sp and tp == 1) or (case["vpp"] > 1 and case["pp"] == 1):
        return False
    return "ep" not in case or ((sp or tp == 1) and tp * case["cp"] * case["dp"] % (case["ep"] * case["etp"]) == 0)


def _cases(ranks: int) -> list[Any]:
    """(family, layout, recompute, precision); families take turns."""
    cases = list(CORNERS if ranks == 8 else CORNERS_OF_16)
    for families, grid, precision in ((DENSE, PLAIN_GRID, DENSE64), (MOE, EXPERT_GRID, MOE64)):
        found = pairwise(grid, allowed=lambda case: _can_be(case, 8), cost=_world)
        if ranks == 16:
            found = pairwise(grid, allowed=lambda case: _can_be(case, 16), cost=_world, already=found)
        for number, case in enumerate(found):
            axes = {axis: value for axis, value in case.items() if axis != "recompute"}
            cases.append((families[number % len(families)], axes, case["recompute"], precision))
    return cases


def _name(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{axis}{int(n)}" for axis, n in value.items() if n > 1 or n is True) or "one rank"
    return str(value[0] if isinstance(value, tuple) else value)


@cache
def _trajectories() -> list[Trajectory]:
    draw = np.random.default_rng(5)
    result = []
    for prompt, lengths in ((9, (4, 11)), (2, (3,)), (14, (5, 1, 6)), (30, (9, 2))):
        tokens = draw.integers(0, VOCABULARY, prompt)
        for sample, length in enumerate(lengths):
            segments = (Segment(draw.integers(0, VOCABULARY, length), True),)
            result.append(Trajectory(str(prompt), sample, tokens, segments, "stop"))
    return result


def _logits_and_gradients(
    rank: int, world: int, folder: str, layout: Layout, recompute: str, dtype: torch.dtype
) -> tuple[list[tuple[np.ndarray, int, torch.Tensor]], list[Any]]:
    """(rows of the batch, first id, logits) of each micro-batch, and the gradients."""
    from megatron_dgrpo.checkpoint.hf.families import read_spec
    from megatron_dgrpo.heads import gather_rows, row_statistics
    from megatron_dgrpo.model.flops import training_cost
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.model.schedule import run_schedule
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import trees
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    axes = {axis: getattr(layout, axis) for axis in ("tp", "cp", "dp", "pp", "ep", "etp")}
    groups, sp = Groups(**axes), layout.sequence_parallel
    groups.seed(0)
    options = BuildOptions(dtype, sequence_parallel=sp, vpp=layout.vpp, recompute=recompute)
    student = load_student(folder, groups=groups, options=options)
    student.zero_grad()
    packing = Packing(
        48, dp=layout.dp, cp=layout.cp, multiple_of=layout.tp, rounds_of=layout.pp if layout.vpp > 1 else 1,
        cost=training_cost(read_spec(folder)), piece_tokens=8,
    )  # fmt: skip
    place, found = groups.grid.coordinate, []
    batches = packing.micro_batches(trees(_trajectories()), rank=place("dp"), cp_rank=place("cp"))
    count = sum(t.num_loss_tokens for t in _trajectories())

    def finish(hidden, batch):
        head = student.decoder.head()
        rows = gather_rows(hidden, torch.from_numpy(batch.row_hidden_R), group=groups.tp, sequence_parallel=sp)
        targets = torch.from_numpy(batch.row_target_R)
        scored = row_statistics(rows, head, targets, temperature=TEMPERATURE, group=groups.tp, want={"logprob"})
        logits = rows.detach() @ head.weight_VH[: head.num_valid].detach().T
        found.append((batch.row_stream_R, head.start, logits))
        return -scored.logprob_T.sum() / count, None

    run_schedule(student.decoder, student.wrapped, batches, finish, forward_only=False)
    student.reduce_gradients()
    gather_data_parallel_gradients(student.wrapped)
    return found, pieces(student.decoder, "main_grad")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, type) -> folder, logits of the batch's rows, gradients; each computed once."""
    made: dict[str, Any] = {}

    def outcome(family: tuple[str, dict[str, Any]], dtype: torch.dtype) -> Any:
        if (key := f"{family}{dtype}") not in made:
            folder = save_tiny(tmp_path_factory.mktemp("model"), family[0], **SIZES, **family[1])
            made[key] = folder, *_by_transformers(as_reference(folder, dtype))
        return made[key]

    return outcome


def _by_transformers(reference: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows, losses = [], []
    for t in _trajectories():
        tokens = torch.from_numpy(np.concatenate([t.prompt_tokens, t.response_tokens]))
        logits = reference(tokens[None]).logits[0, len(t.prompt_tokens) - 1 : -1]
        losses.append(-(logits / TEMPERATURE).log_softmax(-1).gather(1, tokens[len(t.prompt_tokens) :, None])[:, 0])
        rows.append(logits.detach())
    torch.cat(losses).mean().backward()
    return torch.cat(rows), dict(gradients_by_file_name(reference))


def _check(
    expected: Any, family: Any, axes: dict[str, Any], recompute: str, precision: Any, timeout_s: float = 120
) -> None:
    dtype, logits_within, gradients_within = precision
    folder, wanted_logits, wanted = expected(family, dtype)
    layout = Layout(**axes)
    rank = str(folder), layout, recompute, dtype
    ranks = run_distributed(_logits_and_gradients, layout.world_size, *rank, timeout_s=timeout_s)
    logits = torch.full_like(wanted_logits, torch.nan)
    for rows, start, part in (entry for found, _ in ranks for entry in found):
        logits[rows, start : start + part.shape[1]] = part
    assert relative_error(logits, wanted_logits) <= logits_within
    gradients = whole((found for _, found in ranks), tolerance=gradients_within)
    assert gradients.keys() == wanted.keys() - ({"lm_head.weight"} if family[1]["tied"] else set())
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted[name]) <= gradients_within, name


@pytest.mark.parametrize(("family", "axes", "recompute", "precision"), _cases(8), ids=_name)
def test_every_pair_of_settings(expected, family, axes, recompute, precision) -> None:
    _check(expected, family, axes, recompute, precision)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "axes", "recompute", "precision"), _cases(16), ids=_name)
def test_pairs_that_need_16_ranks(expected, family, axes, recompute, precision) -> None:
    _check(expected, family, axes, recompute, precision, timeout_s=500)

"""Transformer Engine's layers against the local ones: bfloat16, and every FP8 recipe. Needs a GPU and the extra `gpu`.

bfloat16 differs by how products round (2 %, of the norm of a tensor); FP8 by three bits of mantissa in every product
(12 %, and a direction that agrees to a cosine of 0.99). A wrong scale or a wrong tensor is off by 100 %.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("needs a GPU and Transformer Engine", allow_module_level=True)

from megatron_dgrpo.testing import run_distributed  # noqa: E402
from megatron_dgrpo.testing.gradients import gather_data_parallel_gradients, pieces, relative_error, whole  # noqa: E402
from megatron_dgrpo.testing.tiny import save_tiny  # noqa: E402

BLACKWELL = 10
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen2.5": ("Qwen2", {"tied": False}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS),
}


def _hidden_and_gradients(
    rank: int, world: int, folder: str, layers: str, fp8: str | None, padding: int, offload: int = 0
) -> Any:
    from megatron_dgrpo.model.layouts import padding_unit
    from megatron_dgrpo.model.megatron_config import BuildOptions
    from megatron_dgrpo.model.schedule import run_schedule
    from megatron_dgrpo.packing.pack import Packing
    from megatron_dgrpo.packing.trees import sequence
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.train.student import load_student

    groups = Groups(tp=1, dp=1)
    options = BuildOptions(torch.bfloat16, layers=layers, fp8=fp8, offload_layers=offload)
    groups.seed(0)
    student = load_student(folder, groups=groups, options=options)
    student.zero_grad()
    tokens = np.random.default_rng(0).integers(0, 500, 250)
    packing = Packing(1024, multiple_of=max(padding, padding_unit(tp=1, fp8=fp8)))
    batches = packing.micro_batches([sequence("0", tokens, np.arange(250) > 0, 0)])
    found = []

    def finish(hidden, batch):
        rows = hidden[:250, 0].float()
        found.append(rows.detach().cpu())
        weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
        return (rows * weight).sum(), None

    run_schedule(student.decoder, student.wrapped, batches, finish, forward_only=False)
    student.reduce_gradients()
    gather_data_parallel_gradients(student.wrapped)
    return found[0], [piece._replace(tensor=piece.tensor.cpu()) for piece in pieces(student.decoder, "main_grad")]


def _cosine(a: Any, b: Any) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fp8", [None, "tensorwise", "blockwise", "mxfp8"])
def test_te_agrees_with_the_local_layers(tmp_path: Path, family: str, fp8: str | None) -> None:
    if fp8 == "mxfp8" and torch.cuda.get_device_capability()[0] < BLACKWELL:
        pytest.skip("MXFP8 products need Blackwell")
    kind, settings = FAMILIES[family]
    sizes = {"vocab_size": 512, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 512}
    folder = save_tiny(tmp_path, kind, **sizes, layers=2, std=0.06, random_norms=True, dtype="bfloat16", **settings)
    ((hidden, gradients),) = run_distributed(_hidden_and_gradients, 1, str(folder), "te", fp8, 1)
    ((expected, wanted),) = run_distributed(_hidden_and_gradients, 1, str(folder), "local", None, 1)
    within, aligned = (0.02, 0.999) if fp8 is None else (0.12, 0.99)
    assert relative_error(hidden, expected) <= within
    found, reference = whole([gradients]), whole([wanted])
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        if "router" not in name and "mlp.gate." not in name:  # which expert is chosen may flip on a tie
            assert _cosine(found[name], gradient) >= aligned, name


def test_padding_does_not_widen_a_scale(tmp_path: Path) -> None:
    """The same tokens with 6 and with 774 tokens of padding: per-tensor scales are those of the tokens alone."""
    folder = save_tiny(tmp_path, vocab_size=512, hidden=256, heads=4, head_dim=64, layers=2, dtype="bfloat16")
    ((few, _),) = run_distributed(_hidden_and_gradients, 1, str(folder), "te", "tensorwise", 1)
    ((many, _),) = run_distributed(_hidden_and_gradients, 1, str(folder), "te", "tensorwise", 1024)
    assert relative_error(many, few) <= 1e-6


def test_activations_that_waited_in_host_memory_give_the_same_gradients(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, vocab_size=512, hidden=256, heads=4, head_dim=64, layers=3, dtype="bfloat16")
    ((hidden, gradients),) = run_distributed(_hidden_and_gradients, 1, str(folder), "te", None, 1, 2)
    ((expected, wanted),) = run_distributed(_hidden_and_gradients, 1, str(folder), "te", None, 1)
    assert torch.equal(hidden, expected)
    found = whole([gradients])
    for name, gradient in whole([wanted]).items():
        assert relative_error(found[name], gradient) <= 1e-6, name

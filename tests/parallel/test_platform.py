from __future__ import annotations

import torch

from megatron_dgrpo.testing import run_distributed


def _elsewhere(rank: int, world: int) -> dict[str, object]:
    """What the rest of the process sees while Megatron runs on the mapped platform."""
    import megatron.core.tensor_parallel.layers as layers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
        )
    )
    x = torch.zeros(2, dtype=torch.float64)
    raised = False
    try:
        torch.zeros(1, device="cuda")
    except (AssertionError, RuntimeError):
        raised = True
    return {
        "cuda": torch.cuda.is_available(),
        "refused": raised,
        "type": x.type(),
        "float": x.float().dtype,
        "inside": str(layers.torch.cuda.current_device()),
        "inside_zeros": str(layers.torch.zeros(1, device="cuda").device),
        "same_ops": layers.torch.matmul is torch.matmul,
        "rotary": model.model.rotary_emb.inv_freq.tolist(),
    }


def test_the_mapping_is_confined_to_megatron() -> None:
    (seen,) = run_distributed(_elsewhere, 1)
    assert seen["cuda"] is False and seen["refused"] is True
    assert seen["type"] == "torch.DoubleTensor" and seen["float"] is torch.float32
    assert seen["inside"] == "cpu" and seen["inside_zeros"] == "cpu" and seen["same_ops"] is True
    expected = (1.0 / 10000.0 ** (torch.arange(0, 32, 2).float() / 32)).tolist()
    assert seen["rotary"] == expected


def _collection(rank: int, world: int) -> dict[str, list[int]]:
    import torch.distributed as dist

    from megatron_dgrpo.parallel.groups import Groups

    groups = Groups(tp=2, dp=2)
    return {
        name: dist.get_process_group_ranks(getattr(groups.collection, name))
        for name in ("tp", "dp", "cp", "pp", "mp", "dp_cp", "tp_dp_cp", "intra_dist_opt", "embd")
    }


def test_groups_of_a_grid() -> None:
    seen = run_distributed(_collection, 4)
    for rank, groups in enumerate(seen):
        tensor = [rank - rank % 2, rank - rank % 2 + 1]
        assert groups["tp"] == groups["mp"] == tensor
        assert groups["dp"] == groups["dp_cp"] == [rank % 2, rank % 2 + 2]
        assert groups["cp"] == groups["pp"] == groups["embd"] == [rank]
        assert groups["tp_dp_cp"] == groups["intra_dist_opt"] == [0, 1, 2, 3]


def _too_large(rank: int, world: int) -> str:
    from megatron_dgrpo.errors import LayoutError
    from megatron_dgrpo.parallel.groups import Groups

    try:
        Groups(tp=2, dp=2)
    except LayoutError as error:
        return str(error)
    return "accepted"


def test_a_layout_larger_than_the_world() -> None:
    assert "needs ranks 0 to 3, but the world has 2" in run_distributed(_too_large, 2)[0]

from __future__ import annotations

import pytest

from megatron_dgrpo.errors import LayoutError
from megatron_dgrpo.testing import run_distributed


def _choose(rank: int, world: int) -> str:
    import importlib.util

    import torch

    from megatron_dgrpo.model.layers import choose_layers

    if torch.cuda.is_available() or importlib.util.find_spec("transformer_engine"):
        return "not the place to show it"
    assert choose_layers("auto", None) == choose_layers("local", None) == "local"
    with pytest.raises(LayoutError, match=r"not installed: install the extra `megatron-dgrpo\[gpu\]`"):
        choose_layers("te", None)
    with pytest.raises(LayoutError, match="fp8=blockwise needs Transformer Engine's layers: set layers=te"):
        choose_layers("auto", "blockwise")
    with pytest.raises(LayoutError, match="offload_layers=2 needs Transformer Engine's layers: set layers=te"):
        choose_layers("auto", None, 2)
    return "done"


def test_without_transformer_engine_asking_for_it_names_the_extra() -> None:
    assert run_distributed(_choose, 1) in (["done"], ["not the place to show it"])

"""transformers as a float64 reference.

transformers' Qwen3 computes its norms in float32 whatever the model's type. A float64 reference must not:
`as_reference` gives it norms in the model's own type.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def as_reference(folder: Path, dtype: torch.dtype) -> Any:
    """The model in transformers, all of it in one type."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype)
    for module in model.modules():
        if type(module).__name__ == "Qwen3RMSNorm":
            module.forward = _norm_in_own_type(module)
    return model


def _norm_in_own_type(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    return forward

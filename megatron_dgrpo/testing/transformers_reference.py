"""transformers as a float64 reference.

transformers computes norms and routers in float32 whatever the model's type. A float64 reference must not:
`as_reference` gives it ones in the model's own type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def as_reference(folder: Path, dtype: torch.dtype) -> Any:
    """The model in transformers, all of it in one type."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm_in_own_type(module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = _router_in_own_type(module)
    return model


def _norm_in_own_type(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    return forward


def _router_in_own_type(router: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
        chosen, indices = torch.topk(logits.softmax(-1), router.top_k, dim=-1)
        if router.norm_topk_prob:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return logits, chosen, indices

    return forward


def gradients_by_file_name(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients under the names that the tensors have on disk, where each expert has its own."""
    for name, parameter in model.named_parameters():
        experts = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if experts is None:
            yield name, parameter.grad
            continue
        for number, gradient in enumerate(parameter.grad):
            if experts[2] == "down_proj":
                yield f"{experts[1]}.{number}.down_proj.weight", gradient
            else:
                for half, part in zip(("gate_proj", "up_proj"), gradient.chunk(2), strict=True):
                    yield f"{experts[1]}.{number}.{half}.weight", part

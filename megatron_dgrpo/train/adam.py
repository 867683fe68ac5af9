"""AdamW whose state Megatron's checkpoints can load again.

Megatron's distributed optimizer saves and loads the state of NVIDIA's FusedAdam: `exp_avg` and `exp_avg_sq` per
parameter, and one `step` per parameter *group*. torch's AdamW keeps `step` with each parameter, which saves and then
fails to load. Where neither Transformer Engine nor NVIDIA's apex provides FusedAdam, this one takes its place, with
the same constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer
import torch


class GroupStepAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        **_: Any,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            scale = group["lr"] / (1 - beta1 ** group["step"])
            correction = (1 - beta2 ** group["step"]) ** 0.5
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"].sqrt() / correction).add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], denominator, value=-scale)


def install() -> None:
    """Give Megatron this Adam where it would use torch's."""
    if megatron.core.optimizer.USING_PYTORCH_OPTIMIZER:
        distributed = megatron.core.optimizer.distrib_optimizer
        megatron.core.optimizer.Adam = distributed.Adam = GroupStepAdam
        megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True

"""What an engine host changes in vLLM's FP8, so that weights in blocks of 128 x 128 can be written again and again.

**Their place stays theirs.** New weights are copied over the old ones, part by part, as vLLM's loaders would put them
there (`loading`). After loading, vLLM lets each layer's kernel rearrange what was loaded, and drops the parameter with
the loader. Here the layer's tensors are kept as they were loaded and compared with what the kernel made of them: where
every bit is in its place, the loaded parameter comes back around the kernel's memory, and can be loaded again. A kernel
that has moved, padded or rescaled anything leaves a note, `MOVED`, and the engine refuses weights: which kernels do is
found out, not assumed. An engine that waits for its first weights has random ones, so a permutation is seen.

**On CPU** vLLM 0.32.0 has block FP8 only for processors with AMX, and packs it. An engine host has kernels of vLLM's
own interfaces in their stead, for any processor and without packing: they widen one weight, or one expert, at a time
and multiply in the type of the activations, which are not quantised.

Axes: `_M` tokens, `_K` inputs, `_N` outputs, `_E` experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, silu
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.quantization import fp8 as vllm_fp8
from vllm.platforms import PlatformEnum, current_platform

from megatron_dgrpo.errors import TransferError, listing
from megatron_dgrpo.rollout.fp8 import FP8, dequantise
from megatron_dgrpo.rollout.fp8_format import SCALE, SCALE_DTYPE, WEIGHT_DTYPE, is_quantised
from megatron_dgrpo.rollout.loading import Place

MOVED = "_dgrpo_moved"


def install() -> None:
    """Safe to call more than once."""
    for method in (vllm_fp8.Fp8LinearMethod, vllm_fp8.Fp8MoEMethod):
        if not hasattr(method.process_weights_after_loading, "_dgrpo"):
            method.process_weights_after_loading = _keeping_places(method.process_weights_after_loading)  # type: ignore[method-assign]
    if current_platform.is_cpu():
        from vllm.model_executor.kernels import linear as kernels

        kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [PlainFp8Linear]
        cpu_moe.CPUExpertsFp8 = PlainFp8Experts  # type: ignore[misc]
        cpu_moe.prepare_fp8_moe_layer_for_cpu = lambda w13, w2: (w13, w2)


def problems(model: torch.nn.Module, quantization: str | None) -> list[str]:
    """Why weights cannot be written into the engine's model."""
    if quantization not in (None, "fp8"):
        return [
            f"its weights are quantised ({quantization}): vLLM computes these when it loads a model, and a transfer "
            "only copies; start the engine from the unquantised folder, with quantization=fp8 or without"
        ]
    found = [f"{name}: {words}" for name, layer in model.named_modules() if (words := getattr(layer, MOVED, ""))]
    if found:
        found.append(
            "so new FP8 weights cannot be written in their place: take another kernel for them (VLLM_USE_DEEP_GEMM=0, "
            "VLLM_USE_DEEP_GEMM_E8M0=0), or start the engine without quantization"
        )
    return found


class Dtypes:
    """Which types an engine's tensors may have: an FP8 weight and its scales one each, others any of the model's."""

    def __init__(self, model: torch.nn.Module, quantization: str | None) -> None:
        self._fp8 = quantization == "fp8"
        found = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
        self._others = found - {WEIGHT_DTYPE}

    def of(self, name: str, shape: Sequence[int]) -> set[str]:
        if self._fp8 and is_quantised(name, shape):
            return {WEIGHT_DTYPE}
        return {SCALE_DTYPE} if self._fp8 and name.endswith(SCALE) else self._others


def check_places(
    places: Mapping[str, Sequence[Place]], manifest: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """That FP8 tensors, and no others, go to FP8 parameters: a copy would cast, and lose the scales."""
    wrong = {
        f"{name}: it is {_word(dtype)}, and goes to a parameter of {_word(place.view.dtype)}"
        for name, (_, dtype) in manifest.items()
        for place in places[name]
        if dtype != place.view.dtype and FP8 in (dtype, place.view.dtype)
    }
    if wrong:
        raise TransferError(listing("Trainer and engine disagree about which weights are FP8:", sorted(wrong)))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keeping_places(process: Any) -> Any:
    def process_and_compare(method: Any, layer: torch.nn.Module) -> None:
        loaded = {
            name: (parameter, parameter.data.clone()) for name, parameter in layer.named_parameters(recurse=False)
        }
        process(method, layer)
        strange = []
        for name, (parameter, before) in loaded.items():
            now = getattr(layer, name, None)
            if now is None or not _same(before, now.data):
                strange.append(name)
                continue
            parameter.data = now.data
            setattr(layer, name, parameter)
        kernel = getattr(method, "fp8_linear", None) or getattr(method, "experts_cls", None)
        words = kernel.__name__ if isinstance(kernel, type) else type(kernel).__name__
        setattr(layer, MOVED, f"{words} rearranges {', '.join(strange)}" if strange else "")

    process_and_compare._dgrpo = True  # type: ignore[attr-defined]
    return process_and_compare


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        (left.shape, left.dtype, left.stride(), left.device) == (right.shape, right.dtype, right.stride(), right.device)
        and left.is_contiguous()
        and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    )


class PlainFp8Linear(Fp8BlockScaledMMLinearKernel):
    """x @ (q s).T of weights that are widened for each product."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return current_platform.is_cpu(), "requires CPU."

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        return linear(A, dequantise(B, Bs).to(A.dtype))


class PlainFp8Experts(cpu_moe.CPUExpertsFp8):
    """Experts one after another, each widened for the tokens that go to it."""

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
              topk_weights: torch.Tensor, topk_ids: torch.Tensor, *args: Any, **kwargs: Any) -> None:  # fmt: skip
        x_MK = hidden_states
        assert self.w1_scale is not None and self.w2_scale is not None
        sum_MK = torch.zeros(x_MK.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            token_M, choice_M = (topk_ids == expert).nonzero(as_tuple=True)
            w13_NK = dequantise(w1[expert], self.w1_scale[expert]).to(x_MK.dtype)
            gate_MN, up_MN = linear(x_MK[token_M], w13_NK).chunk(2, -1)
            w2_KN = dequantise(w2[expert], self.w2_scale[expert]).to(x_MK.dtype)
            own_MK = linear((silu(gate_MN.float()) * up_MN.float()).to(x_MK.dtype), w2_KN)
            sum_MK.index_add_(0, token_M, own_MK.float() * topk_weights[token_M, choice_M, None].float())
        output.copy_(sum_MK)

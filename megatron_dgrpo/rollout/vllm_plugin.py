"""What vLLM loads of this package: an entry point of the group `vllm.general_plugins`, run in each of its processes.

It adds a weight-transfer engine under the name `dgrpo_shm`. In an engine host, and nowhere else, it has FP8 weights
keep their places (`fp8_loading`). In one on CPU it also

- packs linear weights in memory that new ones can be written to (`packed_linear.py`), which vLLM's own packing, done
  when a model is loaded, is not. Those that cannot be packed stay as they are in the checkpoint; in float32 these are
  multiplied by oneDNN all the same: torch's own linear goes to MKL, which takes twice as long where the processor is
  not Intel's;
- keeps seeds right where a prompt is computed in pieces. After each piece vLLM draws a token, throws it away, and winds
  the request's generator back by four, which only CUDA's generators can do; on CPU it raises. Here a request has no
  generator while its prompt is not whole, so that nothing is drawn from it that would have to be given back.

Other uses of vLLM in the environment stay untouched.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # who speaks to a host imports this file, too, and needs no torch

BACKEND = "dgrpo_shm"
HOST_ENV = "MEGATRON_DGRPO_ENGINE_HOST"
_MIN_ROWS = 8
"""Of what plain float32 matrices are multiplied with by oneDNN."""


def register() -> None:
    """Safe to call more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_dgrpo.rollout.device_engine", "DeviceWeightTransferEngine"
        )
    if os.environ.get(HOST_ENV) == "1":
        from megatron_dgrpo.rollout import fp8_loading

        fp8_loading.install()
        pack_linear_weights()
        _keep_generators_from_unfinished_prompts()


def pack_linear_weights() -> None:
    """From here on, in this process."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from megatron_dgrpo.rollout import packed_linear

    if "_dgrpo_dispatch" in vars(utils):
        return
    ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False  # the other packing, on CPUs with AMX
    dispatch = utils.dispatch_cpu_unquantized_gemm

    def dispatch_writable(layer: Any, remove_weight: bool) -> None:
        """vLLM keeps the plain weight of embeddings and heads; it packs embeddings, too, which are no linear layers."""
        multiplies = layer.weight.ndim == 2 and (remove_weight or isinstance(layer, ParallelLMHead))
        packed = packed_linear.pack(layer, in_place=remove_weight) if multiplies else None
        if packed is not None:
            layer.cpu_linear = packed
            return
        dispatch(layer, remove_weight)
        if torch.backends.mkldnn.is_available() and layer.weight.ndim == 2 and layer.weight.dtype == torch.float32:
            layer.cpu_linear = _linear

    utils._dgrpo_dispatch = utils.dispatch_cpu_unquantized_gemm = dispatch_writable  # type: ignore[attr-defined]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias. For a few rows MKL is as fast or faster."""
    import torch

    if x.dtype == torch.float32 and x.numel() >= _MIN_ROWS * x.shape[-1] > 0 and not weight.is_meta:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return torch.nn.functional.linear(x, weight, bias)


def _keep_generators_from_unfinished_prompts() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "_dgrpo_held" in vars(CPUModelRunner):
        return
    sample, bookkeeping = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def sample_without(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The sampler sees the same mapping from rows to generators; rows without one draw from the common one."""
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        self._dgrpo_held = {row: generators.pop(row) for row in unfinished if row in generators}
        return sample(self, *args, **kwargs)

    def give_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = bookkeeping(self, *args, **kwargs)
        self.input_batch.generators.update(self._dgrpo_held)
        self._dgrpo_held = {}
        return found

    CPUModelRunner._dgrpo_held = {}  # type: ignore[attr-defined]
    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = sample_without, give_back  # type: ignore[method-assign]

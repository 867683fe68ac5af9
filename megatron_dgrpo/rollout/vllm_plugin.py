"""What vLLM loads of this package: an entry point of the group `vllm.general_plugins`, run in each of its processes.

It adds a weight-transfer engine under the name `dgrpo_shm`. In an engine host on CPU, and nowhere else, it also keeps
linear weights as they are in the checkpoint: vLLM otherwise packs them for oneDNN when it loads a model, drops the
originals, and cannot write new weights into a packed tied head. Other uses of vLLM in the environment stay untouched.
"""

from __future__ import annotations

import os

BACKEND = "dgrpo_shm"
HOST_ENV = "MEGATRON_DGRPO_ENGINE_HOST"


def register() -> None:
    """Safe to call more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_dgrpo.rollout.shm_engine", "SharedMemoryWeightTransferEngine"
        )
    if os.environ.get(HOST_ENV) == "1":
        _keep_linear_weights_plain()


def _keep_linear_weights_plain() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils

    ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False  # the other packing, on CPUs with AMX

"""Everything that a trainer rank imports, in the one order that works: the platform first, then Megatron-Core.

A server that forks ranks imports this module once; each rank then starts in milliseconds.
"""

from __future__ import annotations

import logging
import warnings

from megatron_dgrpo.parallel import platform

platform.install()
warnings.filterwarnings(
    "ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning
)  # Megatron's calls
logging.getLogger("megatron").setLevel(logging.ERROR)  # notices about extensions that are not installed

import megatron.core.distributed  # noqa: E402, F401
import megatron.core.models.gpt  # noqa: E402, F401
import megatron.core.optimizer  # noqa: E402, F401
import megatron.core.pipeline_parallel  # noqa: E402, F401
import safetensors.torch  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401

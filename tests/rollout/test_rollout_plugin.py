"""What vLLM loads of this package changes nothing outside of an engine host."""

import os
from importlib.metadata import entry_points

import pytest
import torch

from megatron_dgrpo.rollout.vllm_plugin import _linear
from megatron_dgrpo.testing.distributed import run_forked


def register_twice(as_host: bool):
    import vllm._custom_ops as ops
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers import utils

    from megatron_dgrpo.rollout import vllm_plugin

    os.environ.pop(vllm_plugin.HOST_ENV, None)
    if as_host:
        os.environ[vllm_plugin.HOST_ENV] = "1"
    before = ops._supports_onednn, utils.check_cpu_sgl_kernel
    vllm_plugin.register()
    vllm_plugin.register()
    engine = WeightTransferEngineFactory._registry[vllm_plugin.BACKEND]()
    return before[0], ops._supports_onednn, utils.check_cpu_sgl_kernel is before[1], engine.__name__


def test_a_host_packs_weights_by_itself_and_vllm_elsewhere():
    assert run_forked(register_twice, False, preload="engine") == (True, True, True, "DeviceWeightTransferEngine")
    assert run_forked(register_twice, True, preload="engine") == (
        True,
        False,
        False,
        "DeviceWeightTransferEngine",
    )


def test_vllm_finds_the_plugin_where_the_package_is_installed():
    (ours,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "megatron_dgrpo"]
    assert ours.value == "megatron_dgrpo.rollout.vllm_plugin:register"


@pytest.mark.parametrize("shape", [(0, 33), (1, 33), (9, 33), (3, 5, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_with_plain_weights(shape, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(17, 33).to(dtype), torch.randn(17).to(dtype)
    for given in (None, bias):
        right = x.double() @ weight.double().T + (0 if given is None else given.double())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(_linear(x, weight, given).double(), right, rtol=tolerance, atol=tolerance)

"""FP8 engines on a GPU, with the kernels that vLLM has for it: what is pushed is what a fresh engine reads from an FP8
folder, update after update. Should a kernel rearrange its weights, the first push says which, and this fails."""

from __future__ import annotations

import shutil

import pytest
import torch
from gpu_transports import Engine, assert_alike, fresh, needs, push
from rollout_support import FP8_EXPERTS, FP8_SIZES, difference, write_fp8

from megatron_dgrpo.rollout import fp8
from megatron_dgrpo.testing.tiny import save_tiny

pytestmark = needs(1)


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3Moe"])
def test_fp8_weights_from_mapped_memory(tmp_path, family: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8 (Ada, Hopper, or newer)")
    experts = FP8_EXPERTS if family == "Qwen3Moe" else {}
    folders, narrow = [], []
    for seed in (0, 1):
        folders.append(
            str(
                save_tiny(
                    tmp_path / f"v{seed}", family, dtype="bfloat16", tied=False, seed=seed, **FP8_SIZES, **experts
                )
            )
        )
        narrow.append(str(tmp_path / f"fp8-v{seed}"))
        write_fp8(folders[-1], narrow[-1], str(tmp_path / f"widened-v{seed}"))
        shutil.rmtree(tmp_path / f"widened-v{seed}")
    engine = Engine(folders[0], "0", sleeps=True, quantization="fp8")
    try:
        answers = []
        for version in (1, 0, 1):
            engine.client.wake("weights", deadline_s=60)
            assert push("ipc", folders[version], engine, len(answers) + 1, narrow=True) == [""]
            engine.client.wake("kv_cache", deadline_s=60)
            answers.append(engine.answers())
            engine.client.sleep(deadline_s=60)
            assert_alike(answers[-1], fresh(narrow[version], "0"))
        assert difference(answers[0], answers[1]) > 0.01
    finally:
        engine.close()


def test_the_gpu_quantises_as_the_cpu_does() -> None:
    weight = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    here, there = fp8.quantise(weight), fp8.quantise(weight.cuda())
    assert torch.equal(here[1], there[1].cpu())
    assert torch.equal(here[0].view(torch.uint8), there[0].cpu().view(torch.uint8))

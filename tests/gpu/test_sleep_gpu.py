"""Sleep at level 2: what it gives back, and that the rotary tables and whatever else no update brings survive it."""

from __future__ import annotations

import pytest
import torch
from gpu_transports import Engine, assert_alike, fresh, make_folder, needs
from rollout_support import push_folder

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.testing.distributed import run_distributed

pytestmark = needs(1)


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_an_engine_sleeps_and_is_itself_again(tmp_path, monkeypatch: pytest.MonkeyPatch, settings: str) -> None:
    """The weights come through shared memory here, so that sleeping is all that this can fail by."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    folder = make_folder(str(tmp_path), 0)
    engine = Engine(folder, "0", sleeps=True)
    try:
        asleep = torch.cuda.mem_get_info(0)[0]
        for version in (1, 2):
            engine.client.wake("weights", deadline_s=60)
            assert not any(run_distributed(push_folder, 2, folder, engine.address, engine.key, version))
            with pytest.raises(RolloutError, match="not whole"):
                engine.answers()  # it has no memory for keys and values yet
            engine.client.wake("kv_cache", deadline_s=60)
            awake = torch.cuda.mem_get_info(0)[0]
            assert asleep - awake >= 2**26  # the cache at least
            answers = engine.answers()
            engine.client.sleep(deadline_s=60)
            assert torch.cuda.mem_get_info(0)[0] - awake >= 2**26
            assert_alike(answers, fresh(folder, "0"))
    finally:
        engine.close()

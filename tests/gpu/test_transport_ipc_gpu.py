"""A colocated engine: it sleeps, wakes, reads the weights from the trainer's memory on the same GPU, and is right."""

from __future__ import annotations

import pytest
from gpu_transports import Engine, assert_alike, fresh, make_folder, needs, push

from megatron_dgrpo.errors import RolloutError

pytestmark = needs(1)


def test_weights_from_mapped_memory(tmp_path) -> None:
    first, second = make_folder(str(tmp_path / "a"), 0), make_folder(str(tmp_path / "b"), 1)
    engine = Engine(first, "0", sleeps=True)  # is asleep from the start
    try:
        with pytest.raises(RolloutError, match="not whole"):
            engine.answers()
        assert any("sleeps" in error for error in push("ipc", first, engine, 1))
        for version, folder in enumerate((second, first, second), 1):
            engine.client.wake("weights", deadline_s=60)
            assert push("ipc", folder, engine, version) == [""]
            engine.client.wake("kv_cache", deadline_s=60)
            answers = engine.answers()
            engine.client.sleep(deadline_s=60)
            assert_alike(answers, fresh(folder, "0"))
    finally:
        engine.close()

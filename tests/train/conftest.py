"""The tiny models and the task of the tests that run the whole loop, made once for each file."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_dgrpo.testing.one_hop_models import write_models

    folder = tmp_path_factory.mktemp("one_hop")
    write_models(folder, 0)
    return folder

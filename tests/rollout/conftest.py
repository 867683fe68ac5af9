"""The tiny models of the rollout tests, made once."""

import pytest
from rollout_support import make_folders

from megatron_dgrpo.testing.distributed import run_forked


@pytest.fixture(scope="session")
def tied_folders(tmp_path_factory):
    return run_forked(make_folders, str(tmp_path_factory.mktemp("tied")), "tied", 4)


@pytest.fixture(scope="session")
def untied_folders(tmp_path_factory):
    return run_forked(make_folders, str(tmp_path_factory.mktemp("untied")), "untied", 4)


@pytest.fixture(scope="session")
def moe_folders(tmp_path_factory):
    return run_forked(make_folders, str(tmp_path_factory.mktemp("moe")), "moe", 3)

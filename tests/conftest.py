"""What all tests share. Nothing here or in any test touches a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors are tiny here: a second thread is waited for longer than it helps, far longer where other work has its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny import make_thinker


def pytest_xdist_auto_num_workers(config):
    """Two processes for the whole default tier; what is less is over before a second one has imported everything."""
    chosen = config.option.markexpr or config.option.keyword
    return 0 if chosen or config.args_source is not pytest.Config.ArgsSource.TESTPATHS else 2


def pytest_collection_modifyitems(config, items):
    """Skips GPU tests where there is no GPU, and slow ones unless asked for."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with -m slow"))


@pytest.fixture(scope="session")
def thinker():
    """Shared: tests that change it must take `fresh_thinker`."""
    return make_thinker()


@pytest.fixture
def fresh_thinker():
    """One thinker for one test."""
    return make_thinker()

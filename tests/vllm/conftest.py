"""Adapters for vLLM, and engines that serve them: made once, and only where vLLM is."""

import importlib.util
import os

import pytest

from tests.vllm import models

# where vLLM is missing, `test_release.py` says so once for all of these
if importlib.util.find_spec("vllm") is None:
    collect_ignore = [f"test_{name}.py" for name in ("contract", "mixed", "server", "switches", "two_workers")]


@pytest.fixture(scope="session")
def settings_of_vllm():
    """What vLLM reads when it is imported."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="session")
def folder(settings_of_vllm, tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    models.make(root)
    return root


@pytest.fixture(scope="session")
def expected(folder):
    return models.expected(folder)


@pytest.fixture(scope="module")
def engine(settings_of_vllm):
    """Makes engines with small caches, and shuts them down."""
    made = []

    def start(model, **options):
        from tests.vllm.engines import Engine

        made.append(Engine(model, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()

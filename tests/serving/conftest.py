"""A fleet that all tests read and none changes."""

import pytest
import torch

from tests.serving import fleet


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    fleet.save(root, fleet.NAMES)
    return root


@pytest.fixture(scope="session")
def expected(folder):
    answers = {name: fleet.alone(folder, name) for name in fleet.NAMES}
    together = torch.stack([*answers.values()])
    apart = (together.unsqueeze(0) - together.unsqueeze(1)).abs().amax((2, 3))
    assert apart[~torch.eye(len(apart), dtype=torch.bool)].min() > 0.05  # else no test here could fail
    return answers


@pytest.fixture
def model(folder):
    return fleet.served_model(folder)

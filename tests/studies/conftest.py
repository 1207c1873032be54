"""The encoder that studies train with in their tests."""

from pathlib import Path

import pytest

from tests.studies.made_up import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(folder)
    return folder

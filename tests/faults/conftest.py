"""What the tests of faults start from: a good model and text to spoil, and an output folder that is not there yet."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import builders


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A good model of one block, for the test to spoil."""
    folder: Path = shutil.copytree(checkpoint("llama", num_hidden_layers=1), tmp_path / "model")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return builders.write_text(tmp_path / "text.txt")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"

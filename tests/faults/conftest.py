"""Fixtures for the tests of faults: a valid model and text to damage, and an output folder that does not exist yet."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import builders


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A valid model of one block, which the test may damage."""
    folder: Path = shutil.copytree(checkpoint("llama", num_hidden_layers=1), tmp_path / "model")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return builders.write_text(tmp_path / "text.txt")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"

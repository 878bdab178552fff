"""What every test may rely on: Triton's interpreter, no hub, and the material beside a developer's checkout."""

import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # must be set before anything imports triton
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, texts and foreign checkpoints that lie beside a developer's checkout; no user has them."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real models and checkpoints of other tools), which is not beside this checkout")
    return folder

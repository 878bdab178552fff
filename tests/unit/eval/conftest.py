"""Programs of eval/, which is not a package."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).resolve().parents[3] / "eval"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module of eval/ or of eval/peers, whose modules also run in environments without llmq."""
    monkeypatch.syspath_prepend(str(EVAL / "peers"))
    monkeypatch.syspath_prepend(str(EVAL))
    yield importlib.import_module

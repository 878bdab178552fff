"""Every architecture of the list: quantized, saved, loaded and run, with no line of llmq that names it.

How near is near: the loaded model and its float twin multiply the same weights in other orders, so they differ by some
roundings of float32 a layer.
"""

from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES, examine

TOLERANCE = 1e-4


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_quantized_saved_loaded_and_run(model_type: str, tmp_path: Path, text: Path) -> None:
    outcome = examine(model_type, tmp_path, text)
    assert outcome.finite
    assert outcome.difference < TOLERANCE < outcome.noticed
    assert outcome.packed
    assert not outcome.routers
    assert not outcome.unlisted
    assert not outcome.altered
    for distance in (outcome.replayed, outcome.streamed):
        assert distance is None or distance < TOLERANCE

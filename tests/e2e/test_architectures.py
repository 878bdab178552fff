"""A sample of all architectures is quantized, saved, loaded and run; the code of llmq names none of them.

Tolerance: the loaded model and its float twin multiply the same weights in a different order, so they differ by a few
float32 roundings per layer.
"""

from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES, examine, tiny

TOLERANCE = 1e-4
NOT_ESTIMATED = {"jetmoe"}  # its router sorts by values, which a run without weights does not have


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_is_quantized_saved_loaded_and_run(model_type: str, tmp_path: Path, text: Path) -> None:
    outcome = examine(tiny(model_type), tmp_path, text)
    assert outcome.finite
    assert outcome.estimated == (model_type not in NOT_ESTIMATED)
    assert outcome.difference < TOLERANCE < outcome.noticed
    assert outcome.packed
    assert not outcome.routers
    assert not outcome.unlisted
    assert not outcome.altered
    for distance in (outcome.replayed, outcome.streamed):
        assert distance is None or distance < TOLERANCE

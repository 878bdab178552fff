"""Where end-to-end tuning keeps hidden states."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmq import memory
from llmq.model.passes.hidden_states import Place
from llmq.model.passes.streams import Text
from llmq.steps.end_to_end import memory_plan

SEQUENCE = 100  # bytes


@pytest.mark.parametrize(("validation", "place"), [(10, Place.HOST), (11, Place.FILE)])
def test_only_the_validation_text_needs_memory(
    validation: int, place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "spare", lambda device: 20 * SEQUENCE)  # of which half may be taken
    skeleton = SimpleNamespace(hidden_bytes=lambda tokens: SEQUENCE, device=torch.device("cpu"))
    writer = SimpleNamespace(activations=tmp_path)
    run: Any = SimpleNamespace(skeleton=skeleton, plans={}, writer=writer, economy=memory.Economy.NONE)
    text = Text(torch.zeros(200, 8, dtype=torch.int64), 1, validation)
    assert memory_plan.choose(run, text).states == place

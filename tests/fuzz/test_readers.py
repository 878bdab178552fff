"""Damaged inputs for everything that llmq reads: each is read or refused with an error of llmq.

A case is its reader, the seed and its number, so the same three give the same input. scripts/fuzz.py runs many of them.

    LLMQ_FUZZ=5000 python -m pytest tests/fuzz          5,000 inputs per reader instead of a few
    LLMQ_FUZZ_SEED=7                                    other inputs
    LLMQ_FUZZ_CASE=1234 python -m pytest tests/fuzz -k gguf    one input again, with its traceback
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import attempts, inputs

CASES, SEED, ONLY = (os.environ.get(f"LLMQ_FUZZ{name}") for name in ("", "_SEED", "_CASE"))


@pytest.fixture(scope="module")
def originals(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> inputs.Originals:
    return inputs.Originals(checkpoint("llama", **inputs.SIZES), tmp_path_factory.mktemp("originals"))


@pytest.mark.timeout(0 if CASES else 300)
@pytest.mark.parametrize("reader", inputs.READERS)
def test_damaged_inputs_are_read_or_refused(reader: str, originals: inputs.Originals, tmp_path: Path) -> None:
    seed, few = int(SEED or 0), inputs.READERS[reader][1]
    if ONLY:
        inputs.prepared(reader, seed, int(ONLY), originals, tmp_path)()
        return
    outcomes = attempts.Outcomes()
    inputs.attempt_all(range(int(CASES or few)), outcomes, reader, seed, originals, tmp_path)
    print(reader, outcomes)
    assert not outcomes.failures, str(outcomes)

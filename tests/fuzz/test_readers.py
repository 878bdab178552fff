"""Damaged inputs for everything that llmq reads: each is read or refused with an error of llmq.

A case is its reader, the seed and its number, so the same three give the same input.

    LLMQ_FUZZ=100000 python -m pytest tests/fuzz        100,000 inputs per reader instead of a few
    LLMQ_FUZZ_SEED=7                                    other inputs
    LLMQ_FUZZ_CASE=1234 python -m pytest tests/fuzz -k gguf    one input again, with its traceback
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import attempts, inputs

CASES, SEED, ONLY = (os.environ.get(f"LLMQ_FUZZ{name}") for name in ("", "_SEED", "_CASE"))


@pytest.fixture(scope="module")
def originals(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> inputs.Originals:
    model = checkpoint("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return inputs.Originals(model, tmp_path_factory.mktemp("originals"))


@pytest.mark.timeout(0 if CASES else 300)
@pytest.mark.parametrize("reader", inputs.READERS)
def test_damaged_inputs_are_read_or_refused(reader: str, originals: inputs.Originals, tmp_path: Path) -> None:
    prepare, few = inputs.READERS[reader]
    outcomes = attempts.Outcomes()

    def case(number: int) -> Callable[[], object]:
        return prepare(random.Random(f"{SEED or 0}/{reader}/{number}"), originals, tmp_path)

    if ONLY:
        case(int(ONLY))()
        return
    with attempts.limits():
        for number in range(int(CASES or few)):
            call = case(number)
            nbytes = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
            attempts.start_clock()
            outcomes.attempt(number, call, nbytes)
            for entry in tmp_path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    print(reader, outcomes)
    assert not outcomes.failures, str(outcomes)

"""The determinism contract of docs/RELIABILITY.md: what changes no byte of the result."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import memory
from llmq.memory import Economy
from llmq.methods import METHODS, Method
from llmq.steps import run as run_module
from tests import builders, mixtures, runs

METHODS_TESTED = {"awq": METHODS["awq"], "fast": METHODS["fast"]}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_number_of_threads_changes_no_byte(
    method: str, threads: Callable[[int], None], checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Layers have up to 64 inputs. From 256 inputs on, LAPACK's Cholesky factor depends on the number of threads."""
    model = checkpoint("llama", num_hidden_layers=2)
    for number in (1, 2):
        threads(number)
        runs.quantize(model, tmp_path / str(number), text, stages=METHODS_TESTED[method])
    assert runs.files_of(tmp_path / "1") == runs.files_of(tmp_path / "2")


def test_number_of_threads_changes_no_byte_of_wide_layers_without_a_factor(
    threads: Callable[[int], None], checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = checkpoint("llama", num_hidden_layers=1, **sizes)
    for number in (1, 2):
        threads(number)
        runs.quantize(model, tmp_path / str(number), text, method="rtn")
    assert runs.files_of(tmp_path / "1") == runs.files_of(tmp_path / "2")


def test_economy_changes_no_byte_of_a_model_with_experts(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_QUANTIZE", {"cpu": 2 * 48})
    model = builders.save_model(tmp_path / "model", builders.causal_model(mixtures.mixtral(), dtype="bfloat16"))
    settings: dict[str, Any] = {"stages": Method(rounding="gptq", alphas=(1.0,), validation=0.25, expert_tokens=2.0)}
    runs.quantize(model, tmp_path / "plain", text, **settings)
    streams_of = run_module.streams_of

    def economical(*arguments: Any, **options: Any) -> Any:
        return streams_of(*arguments, **{**options, "economy": Economy.STATES_IN_FILES})

    monkeypatch.setattr("llmq.job.streams_of", economical)
    runs.quantize(model, tmp_path / "economical", text, **settings)
    assert runs.files_of(tmp_path / "economical") == runs.files_of(tmp_path / "plain")

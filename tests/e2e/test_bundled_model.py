"""The model bundled with the project: the statements of its model card, and the result that the demo shows."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoConfig

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.evaluation.measure import measure

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "eval" / "models" / "tiny-python-llama"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    spec = importlib.util.spec_from_file_location("stdlib_text", ROOT / "scripts" / "stdlib_text.py")
    assert spec is not None and spec.loader is not None
    stdlib_text = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stdlib_text)
    calibration, validation = stdlib_text.write_texts(tmp_path_factory.mktemp("text"), evaluation_characters=60_000)
    return calibration, validation


def test_the_model_is_small_and_fits_every_format() -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert Checkpoint.open(MODEL).nbytes <= 10_000_000
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_hidden_layers >= 4
    assert config.hidden_size % 256 == 0 and config.intermediate_size % 256 == 0


@pytest.mark.slow
def test_gptq_has_a_lower_divergence_than_rtn(texts: tuple[Path, Path], tmp_path: Path) -> None:
    calibration, validation = texts
    divergence = {}
    for method in ("rtn", "gptq"):
        llmq.quantize(
            str(MODEL),
            tmp_path / method,
            method=method,
            calibration=[str(calibration)],
            samples=32,
            seqlen=256,
            validate=0,
        )
        evaluation = measure(tmp_path / method, MODEL, str(validation), seqlen=256, limit=16)
        assert evaluation.original is not None and evaluation.original.perplexity < 25, "the model was trained"
        divergence[method] = evaluation.model.kl_mean
    assert divergence["gptq"] < 0.8 * divergence["rtn"]

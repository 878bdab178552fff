"""llmq in Python: text and models in memory, and results that show themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llmq
from llmq.errors import CalibrationError, ConfigError
from tests import builders, runs

TEXTS = [f"Text {number}. " + f"word {number} " * 30 for number in range(12)]
QUICK: dict[str, Any] = {**runs.QUICK, "device": "cpu", "method": "gptq"}


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=1)


def loaded(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_texts_and_their_tokens_give_the_same_model(folder: Path, tmp_path: Path) -> None:
    _, tokenizer = loaded(folder)
    llmq.quantize(folder, tmp_path / "texts", calibration=TEXTS, **QUICK)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    report = llmq.quantize(folder, tmp_path / "ids", calibration=ids, **QUICK)
    runs.assert_same_weights(tmp_path / "ids", tmp_path / "texts")
    assert report.calibration is not None and report.calibration["sources"][0].startswith("python-")
    again = llmq.quantize(folder, tmp_path / "texts", calibration=TEXTS, **QUICK)
    assert again.seconds and (tmp_path / "texts" / "config.json").exists()
    with pytest.raises(ConfigError, match="is not empty"):
        llmq.quantize(folder, tmp_path / "texts", calibration=TEXTS[1:], **QUICK)


def test_a_model_in_memory_gives_the_same_as_its_folder(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    llmq.quantize(folder, tmp_path / "one", calibration=TEXTS, **QUICK)
    options = {**QUICK, "tokenizer": tokenizer, "calibration": TEXTS}
    report = llmq.quantize(model, tmp_path / "two", **options)
    runs.assert_same_weights(tmp_path / "two", tmp_path / "one")
    assert report.source == str(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert llmq.quantize(model, tmp_path / "two", **options).request == report.request  # finished already
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "two"]
    model.lm_head.weight.data += 1
    with pytest.raises(ConfigError, match="is not empty"):
        llmq.quantize(model, tmp_path / "two", **options)


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(folder)
    with pytest.raises(ConfigError, match="tokenizer is a NoneType"):
        llmq.quantize(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="needs an output folder"):
        llmq.quantize(model, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="model is a Linear"):
        llmq.quantize(torch.nn.Linear(2, 2), tmp_path / "out", tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenizer is for a model in memory"):
        llmq.quantize(folder, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(CalibrationError, match="token id"):
        llmq.quantize(folder, tmp_path / "out", calibration=[[1, -1]], **QUICK)
    with pytest.raises(ConfigError, match="unknown setting: 'metod'"):
        llmq.quantize(folder, tmp_path / "out", metod="rtn")  # type: ignore[call-arg]
    assert not (tmp_path / "out").exists()


def test_ids_that_the_model_does_not_have(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(llmq.LlmqError, match=f"token id 9999, but the model has embeddings for {builders.VOCABULARY}"):
        llmq.quantize(folder, tmp_path / "out", calibration=[[9999] * 200], **QUICK)


def test_every_result_shows_itself(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = [
        llmq.quantize(folder, out, calibration=TEXTS, **{**QUICK, "group_size": 32}),
        llmq.evaluate(out, against=folder, text=text, seqlen=48, windows=2, device="cpu"),
        llmq.convert(out, tmp_path / "mlx", to="mlx"),
        llmq.verify(out),
        llmq.verify(out, quick=True),
        llmq.inspect(out),
    ]
    for result in results:
        assert len(str(result).splitlines()) > 2 and str(result).isprintable() is False
        assert result._repr_html_().startswith("<table>")
    assert "KL mean" in str(results[1]) and "compatible engines" in str(results[3])


def test_a_broken_model_shows_its_problems(folder: Path, tmp_path: Path) -> None:
    llmq.quantize(folder, tmp_path / "out", method="rtn", group_size=16, device="cpu")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    result = llmq.verify(tmp_path / "out")
    assert not result.intact and "is broken" in str(result) and result.verdicts == ()
    with pytest.raises(llmq.LlmqError, match="tokenizer.json has changed"):
        result.require_intact()

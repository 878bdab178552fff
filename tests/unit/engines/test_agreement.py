"""The comparison of an engine with llmq, with stand-ins for the process of the engine."""

import dataclasses
import importlib
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq as package
from llmq.engines import agreement, processes
from llmq.engines.agreement import compare
from llmq.engines.processes import LLAMA_CPP, LLMQ, MLX, ONNX, TRANSFORMERS, VLLM, ask
from llmq.errors import BackendError, CheckpointError, ConfigError, QualityError
from tests import builders
from tests.command_line import llmq

Answer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", num_hidden_layers=2)


def engine_that(shift: float = 0.0, tokens: Callable[[list[int]], list[int]] = list) -> Answer:
    """An engine with transformers' predictions, of which the best is off by `shift`, and its own tokens."""

    def answer(engine: Any, request: dict[str, Any], python: str | None = None) -> dict[str, Any]:
        float_model, tokenizer = package.load(request["model"], device="cpu", dtype=torch.float32)
        scores = []
        for prompt in request["prompts"]:
            with torch.no_grad():
                logits = float_model(input_ids=torch.tensor([prompt])).logits[0]
            best = logits.log_softmax(-1).topk(request["top"])
            best.values[-1, 0] += shift
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            scores.append([list(zip(*pair, strict=True)) for pair in pairs])
        ids = [tokens(list(tokenizer(text)["input_ids"])) for text in request["texts"]]
        return {"version": "stand-in 1.0", "tokens": ids, "scores": scores}

    return answer


def test_an_engine_that_agrees_passes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "ask", engine_that())
    done = llmq("verify", model, "--quick", "--run", "mlx", "--json")
    ran = json.loads(done.stdout)["run"]
    assert done.exit_code == 0
    assert ran["largest"] < 1e-4 and ran["same_top"] == 1.0 and ran["tokenized"] and ran["positions"] > 100
    assert (ran["engine"], ran["dtype"], ran["limit"]) == ("stand-in 1.0", "float32", 0.01)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (engine_that(shift=0.02), "log-probabilities differ by 0.0200"),
        (engine_that(shift=float("nan")), "log-probabilities differ by nan"),
        (engine_that(tokens=lambda ids: ids[1:]), "cuts the prompts"),
    ],
)
def test_an_engine_that_computes_something_else_fails(
    answer: Answer, words: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "ask", answer)
    done = llmq("verify", model, "--quick", "--run", "mlx")
    assert done.exit_code == QualityError.exit_code and words in done.stderr
    assert "largest difference" in done.stdout


def test_the_limit_can_be_given(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "ask", engine_that(shift=0.02))
    assert llmq("verify", model, "--quick", "--run", "mlx", "--max-difference", "0.03").exit_code == 0


def test_positions_without_log_probabilities_are_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp gives none after a token that is a part of a character."""
    expected = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64).log()
    differences, same = agreement._differences([[[], [(1, float(expected[1, 1]))]]], [expected])
    assert differences.tolist() == [0] and same == [True]
    monkeypatch.setattr(agreement, "ask", lambda *_: {"version": "x", "scores": [[[], []]], "tokens": []})
    with pytest.raises(BackendError, match="gave no log-probabilities"):
        compare(model, MLX)


def test_engines_without_float32_products_get_a_wider_limit(model: Path) -> None:
    cpu = torch.device("cpu")
    assert agreement._dtype(model, VLLM, cpu) == "float32"
    assert agreement._dtype(model, MLX, torch.device("cuda")) == "auto"
    assert agreement._limit(model, "bfloat16") > agreement._limit(model, "float32")


def test_quantized_inputs_get_a_wider_limit(model: Path, tmp_path: Path) -> None:
    """Engines round them to 8 bits in another way."""
    limits = []
    for name, preset in (("w8a16", None), ("w8a8", "w8a8")):
        settings = {"bits": 8, "group_size": "channel", "preset": preset}
        package.quantize(model, tmp_path / name, method="rtn", device="cpu", **settings)
        limits.append(agreement._limit(tmp_path / name, "float32"))
    assert limits == [agreement.LIMIT_FLOAT32, agreement.LIMIT_INT8_INPUTS]


def test_llama_cpp_wants_a_gguf_file(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs \.gguf files"):
        compare(model, LLAMA_CPP)
    assert llmq("verify", model, "--run", "sglang").exit_code == ConfigError.exit_code


@pytest.fixture(scope="module")
def graph(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ONNX model with a graph of no bytes, which a stand-in runs, and the record of its conversion."""
    folder = tmp_path_factory.mktemp("onnx") / "graph"
    source = shutil.copytree(model, folder.parent / "source")
    (source / "llmq.json").write_text('{"request": "a1"}')
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.onnx").touch()
    conversion = {"source": str(source), "run": "a1", "to": "onnx", "activations": "none"}
    (folder / "llmq.json").write_text(json.dumps({"conversions": [conversion]}))
    return folder


def test_a_graph_is_compared_with_its_source(model: Path, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "ask", lambda *given: engine_that()(given[0], {**given[1], "model": str(model)}))
    done = llmq("verify", graph, "--run", "onnxruntime", "--json")
    assert done.exit_code == 0, done.stderr
    verified = json.loads(done.stdout)
    assert verified["run"]["largest"] < 1e-4 and verified["run"]["dtype"] == "float32"
    assert not any(engine["loads"] for engine in verified["engines"].values()) and len(verified["findings"]) == 5
    for odd in ("nowhere" * 1000, "a\0b", ""):
        record = {"run": "a1", "activations": "int8", "source": odd}
        builders.change_json(graph / "llmq.json", conversions=[record])
        with pytest.raises(ConfigError, match="not known or has changed") as caught:
            compare(graph, ONNX[0])
    assert "--against" in caught.value.hint
    assert compare(graph, ONNX[0], against=model).limit == agreement.LIMIT_8_BITS
    builders.change_json(graph / "llmq.json", conversions=[{"to": "onnx"}])  # as older versions of llmq wrote it
    compared = compare(graph, ONNX[0], against=model)
    assert compared.limit == agreement.LIMIT_FLOAT32
    with pytest.raises(QualityError) as caught:
        dataclasses.replace(compared, largest=0.3).require(str(graph))
    assert "converted with --activations int8" in caught.value.hint and "--max-difference 0.5" in caught.value.hint


def test_engines_and_graphs_must_fit(model: Path, graph: Path) -> None:
    for folder, engine, options, words in (
        (model, ONNX[0], {}, "onnxruntime runs ONNX models, found"),
        (graph, MLX, {}, "mlx does not run the ONNX model"),
        (model, MLX, {"against": graph}, "--against is for ONNX models"),
        (graph, ONNX[1], {"against": graph}, "expected the quantized folder that"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=words):
            compare(folder, engine, **options)
    assert "given without --run" in llmq("verify", graph, "--against", model).stderr


def test_a_process_of_an_engine_scores_and_is_measured(model: Path) -> None:
    options = {"device": "cpu", "dtype": "float32", "remote_code": False, "llmq": False}
    request = {"task": "time", "model": str(model), "options": options, "prompt": [5, 6, 7], "new_tokens": 4}
    answer = ask(LLMQ, {**request, "repeats": 2})
    assert len(answer["seconds"]) == 2 and all(first > 0 and rest > 0 for first, rest in answer["seconds"])
    assert answer["host_bytes"] > 10**7 and answer["version"] == f"llmq {package.__version__}"


def test_scores_of_transformers_agree(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process of transformers runs, in this process."""
    monkeypatch.syspath_prepend(str(processes.CHILDREN))
    child = importlib.import_module("on_transformers")
    main = runpy.run_path(str(processes.CHILDREN / "__main__.py"), run_name="child")

    def here(engine: Any, request: dict[str, Any], python: str | None) -> dict[str, Any]:
        opened = child.Engine(request["model"], request["options"])
        return {"version": opened.version, **main["score"](opened, request)}

    monkeypatch.setattr(agreement, "ask", here)
    result = compare(model, TRANSFORMERS, device="cpu")
    assert result.largest < 1e-4 and result.tokenized and result.engine.startswith("transformers ")


def test_an_engine_that_is_missing_or_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"task": "score", "model": str(tmp_path), "options": {}}
    absent = processes.Engine("mlx", "MLX", "mlx_lm", "mlx-lm")
    monkeypatch.setattr(processes, "CHILDREN", tmp_path)
    (tmp_path / "__main__.py").write_text("import json, sys\njson.dump({'missing': 'mlx'}, open(sys.argv[2], 'w'))\n")
    with pytest.raises(BackendError, match="it has no module 'mlx'") as caught:
        ask(absent, request)
    assert "pip install mlx-lm" in caught.value.hint
    (tmp_path / "__main__.py").write_text("raise ValueError('out of memory')\n")
    with pytest.raises(BackendError, match="ValueError: out of memory"):
        ask(absent, request)
    with pytest.raises(BackendError, match="cannot be started"):
        ask(absent, request, python=str(tmp_path / "no-python"))

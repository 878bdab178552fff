"""Graphs of `llmq convert --to onnx` in ONNX Runtime and OpenVINO: llmq's weights, logits, evaluation and text."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import UnsupportedModelError
from llmq.runtime.checkpoint_weights import PackedWeights
from tests.command_line import llmq as command

PACKAGES = ("onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai", "openvino", "transformers.exporters")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="needs onnxscript, onnxruntime and others, which scripts/test.sh installs in a separate environment",
    ),
]
MIXED: dict[str, Any] = {
    "symmetric": False,
    "overrides": ["*k_proj:bits=8", "*up_proj:bits=3,group_size=32", "*down_proj:group_size=channel"],
    "skip": ["*0.self_attn.v_proj"],
    "quantize_head": True,
}
TOKENS = torch.randint(3, 260, (2, 24), generator=torch.Generator().manual_seed(0))
PAST = 10  # tokens that are in the cache before the others
EXACT, OPENVINO_EXACT = 1e-4, 1e-3  # logits


@pytest.fixture(scope="module")
def packed(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with several grids, zero points, and a float layer between quantized ones that share its input."""
    out = tmp_path_factory.mktemp("packed") / "out"
    model = checkpoint("llama", num_hidden_layers=1)
    llmq.quantize(str(model), out, method="rtn", scales="minmax", group_size=16, validate=0, **MIXED)
    return out


@pytest.fixture(scope="module")
def exported(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "out"
    done = command("convert", packed, out, "--to", "onnx")
    assert done.exit_code == 0, done.stderr
    assert "7 tensors compared, 0 differ" in done.stdout
    assert "run by onnxruntime" in done.stderr
    return out


@pytest.mark.parametrize(("engine", "limit"), [("onnxruntime", EXACT), ("openvino", OPENVINO_EXACT)])
def test_engines_compute_the_logits_of_llmq(packed: Path, exported: Path, engine: str, limit: float) -> None:
    from llmq.runtime.onnx_model import OnnxModel

    graph = OnnxModel(exported, engine)
    ours, _ = llmq.load(packed, device="cpu")
    with torch.no_grad():
        expected = ours(TOKENS).logits.numpy()
    at_once, _ = graph.run(TOKENS.numpy())
    before, cache = graph.run(TOKENS[:, :PAST].numpy())
    after, _ = graph.run(TOKENS[:, PAST:].numpy(), cache, PAST)
    assert np.abs(at_once - expected).max() <= limit
    assert np.abs(np.concatenate([before, after], axis=1) - expected).max() <= limit


def test_evaluation_of_the_graph_equals_that_of_the_folder(
    checkpoint: Callable[..., Path], packed: Path, exported: Path, text: Path
) -> None:
    original = checkpoint("llama", num_hidden_layers=1)
    settings: dict[str, Any] = {"against": original, "text": text, "seqlen": 32, "windows": 4, "trajectories": 2}
    expected = llmq.evaluate(packed, **settings)
    for engine in (None, "openvino"):
        measured = llmq.evaluate(exported, engine=engine, **settings)
        assert measured.model.kl_mean == pytest.approx(expected.model.kl_mean, abs=1e-5)
        assert measured.trajectories == expected.trajectories
        assert any(f"was run by {engine or 'onnxruntime'}" in note for note in measured.notes)
    assert measured.size.file_bytes == sum(file.stat().st_size for file in exported.glob("model.onnx*"))


def test_generation_and_speed_run_through_the_engines(packed: Path, exported: Path) -> None:
    greedy = ("--prompt", "The river rises", "--max-tokens", "50", "--temperature", "0")
    ours, theirs = (command("generate", folder, *greedy) for folder in (packed, exported))
    assert theirs.exit_code == 0, theirs.stderr
    assert len(ours.stdout) > 50 and theirs.stdout == ours.stdout
    done = command("verify", exported, "--run", "openvino", "--json")
    assert json.loads(done.stdout)["run"]["largest"] < OPENVINO_EXACT
    done = command("bench", exported, "--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--json")
    assert json.loads(done.stdout)["results"][0]["engine"].startswith("onnxruntime")


def test_the_folder_has_the_files_of_the_model_and_is_loaded_by_transformers(packed: Path, exported: Path) -> None:
    from transformers.exporters import ExportedModel

    config = json.loads((exported / "config.json").read_text())
    assert "quantization_config" not in config
    assert {file.name for file in packed.glob("token*")} <= {file.name for file in exported.iterdir()}
    assert list(json.loads((exported / "llmq.json").read_text())["checksums"])
    assert ExportedModel.from_pretrained(exported).device.type == "cpu"
    again = command("convert", packed, exported, "--to", "onnx")
    assert "finished already" in again.stderr
    assert "holds an ONNX model" in command("inspect", exported).stderr


def test_a_weight_that_is_not_in_the_graph_is_an_error(packed: Path) -> None:
    import onnx_ir

    from llmq.export.onnx.graph import Codes

    empty = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[]), ir_version=10)
    with pytest.raises(UnsupportedModelError, match="no product with .* \\(7 of 7 quantized weights\\)"):
        Codes(PackedWeights(Checkpoint.open(packed)), 0).quantize(empty, None, None)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "FusedMatMul", "expert"])
def test_products_of_every_form_get_the_codes(packed: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight as it is, transposed with a bias, transposed in the operator, and as a part of stacked experts."""
    import onnx_ir

    from llmq.export.onnx.graph import Codes, stored_weights

    weights = PackedWeights(Checkpoint.open(packed))
    module = "model.layers.0.self_attn.q_proj"
    monkeypatch.setattr(weights, "modules", [module])
    weight = weights.weight(module).numpy()
    x, out = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ("t", 32)), onnx_ir.val("out", onnx_ir.DataType.FLOAT, ("t", 32))

    def constant(name: str, array: Any) -> Any:
        return onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=name))

    nodes = []
    if kind == "MatMul":
        inputs, attributes, domain = [x, constant("w", weight.T)], {}, ""
    elif kind == "Gemm":
        inputs = [x, constant("w", weight), constant("b", np.ones(32, np.float32))]
        attributes, domain = {"transB": 1}, ""
    elif kind == "FusedMatMul":
        inputs, attributes, domain = [x, constant("w", weight)], {"transB": 1}, "com.microsoft"
    else:
        stacked = constant("w", np.stack([weight.T + 1, weight.T]))
        nodes.append(onnx_ir.node("Split", [stacked], {"axis": 0, "num_outputs": 2}, num_outputs=2))
        axes = constant("axes", np.zeros(1, np.int64))
        nodes.append(onnx_ir.node("Squeeze", [nodes[0].outputs[1], axes]))
        inputs, attributes, domain = [x, nodes[1].outputs[0]], {}, ""
    operator = "MatMul" if kind == "expert" else kind
    nodes.append(onnx_ir.node(operator, inputs, attributes, domain=domain, outputs=[out], name="product"))
    graph = onnx_ir.Graph([x], [out], nodes=nodes, opset_imports={"": 18})
    for value in (
        value for node in nodes for value in node.inputs if value is not None and value.const_value is not None
    ):
        graph.register_initializer(value)
    model = Codes(weights, 4).quantize(onnx_ir.Model(graph, ir_version=10), None, None)
    stored = stored_weights(model)
    assert list(stored) == [module]
    assert np.array_equal(stored[module].dequantize(), weight)
    assert [node.op_type for node in model.graph] == ["MatMulNBits", *(["Add"] if kind == "Gemm" else [])]
    assert model.graph[0].attributes["accuracy_level"].as_int() == 4
    assert model.graph.outputs[0].name == "out"


# ---- the builder of onnxruntime-genai, which reads gptq folders


KEPT = ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather", "shared_embeddings=false"]


def test_the_builder_of_genai_keeps_the_model_only_with_three_options(
    checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it quantizes embedding and head again, and rounds inputs to 8 bits, without a message."""
    from onnxruntime_genai.models import builder

    monkeypatch.chdir(tmp_path)
    model = checkpoint("llama", num_hidden_layers=1, hidden_size=64, head_dim=16)
    llmq.quantize(str(model), "packed", method="rtn", scales="minmax", group_size=32, validate=0, format="gptq")
    distance = {}
    for name, options in (("default", []), ("kept", KEPT)):
        arguments = ("", "packed", name, "int4", "cpu", "cache")
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))
        (tmp_path / name / "config.json").write_bytes((tmp_path / "packed" / "config.json").read_bytes())
        measured = llmq.evaluate(name, against="packed", text=text, seqlen=32, windows=4)
        distance[name] = measured.model.kl_mean or 0.0
    assert distance["kept"] < 1e-6 < 1e-4 < distance["default"]

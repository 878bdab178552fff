"""`llmq.load` fuses layers that share an input: which layers, equal results, and the memory needed."""

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig

import llmq
from llmq.runtime.fused_linear import FusedLinear
from llmq.runtime.packed_linear import PackedLinear, PackedRows
from tests import builders

Checkpoints = Callable[..., Path]
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ROUNDING = 1e-5  # float32 rounding over a few layers, relative to the largest logit


def quantize(model: Path, out: Path, **settings: Any) -> Path:
    llmq.quantize(str(model), out, **{"method": "rtn", "scales": "minmax", "group_size": 32, **settings})
    return out


def groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The last parts of the names of the layers in each group, in the order of the groups."""
    by_stack: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear):
            by_stack.setdefault(id(module.stack), []).append(path.rpartition(".")[2])
    return [tuple(names) for names in by_stack.values()]


EXPECTED = {
    "llama": [QKV, GATE_UP],
    "qwen3": [QKV, GATE_UP],
    "gemma3": [QKV, GATE_UP],
    "stablelm": [QKV, GATE_UP],  # all five have one input, but a common product would have to wait for the attention
    "neox": [],  # its weights are stored fused
    "phi3": [],
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_layers_that_share_an_input_are_fused_with_equal_output(
    architecture: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    quantized = quantize(checkpoint(architecture, num_hidden_layers=2), tmp_path / "out")
    fused, _ = llmq.load(quantized)
    apart, _ = llmq.load(quantized, fuse=False)
    assert groups(fused) == EXPECTED[architecture] * 2
    assert groups(apart) == []
    tokens = builders.tokens(2, 12)
    with torch.inference_mode():
        output, expected = fused(tokens).logits, apart(tokens).logits
    assert float((output - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


def test_every_fused_layer_returns_its_own_weight(checkpoint: Checkpoints, tmp_path: Path) -> None:
    overrides = ["k_proj:symmetric=false", "up_proj:bits=8"]
    quantized = quantize(checkpoint("llama", num_hidden_layers=1), tmp_path / "out", overrides=overrides)
    model, _ = llmq.load(quantized)
    assert groups(model) == [QKV]  # gate and up differ in bits
    weights = dict(llmq.dequantize(quantized))
    assert len(weights) == 7
    for name, weight in weights.items():
        assert model.get_submodule(name.removesuffix(".weight")).quantized().dequantize().equal(weight), name
    assert model.get_submodule("model.layers.0.self_attn.q_proj").quantized().zeros is None


def test_a_skipped_layer_does_not_prevent_fusing_the_others(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", num_hidden_layers=1), tmp_path / "out", skip=["k_proj"])
    assert groups(llmq.load(quantized)[0]) == [("q_proj", "v_proj"), GATE_UP]


def test_a_compiled_model_computes_the_same_logits(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model, _ = llmq.load(quantize(checkpoint("llama", num_hidden_layers=1), tmp_path / "out"))
    products = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        products.append(sum("w4a16_linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tokens = builders.tokens(2, 12)
    with torch.no_grad():
        output = compiled(tokens, use_cache=False).logits
        assert output.equal(model(tokens, use_cache=False).logits)
    assert products == [4]  # qkv, o, gate and up, down


# ---- memory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in_features are multiples of 128, so packed rows have no padding."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = LlamaConfig(**{**builders.GROUPED, **sizes})
    folder = tmp_path_factory.mktemp("wide")
    return builders.save_model(folder / "model", builders.causal_model(config, dtype="float16"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_loaded_model_takes_the_memory_of_its_file(
    fuse: bool, symmetric: bool, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMQ_CPU_INT4", "off")  # no second copy of the quantized values, which only CPUs have
    quantized = quantize(wide, tmp_path / "out", group_size=128, symmetric=symmetric)
    model, _ = llmq.load(quantized, fuse=fuse, dtype=torch.float16)
    storages = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    stored = sum(tensor.nbytes for tensor in load_file(quantized / "model.safetensors").values())
    assert stored / 1.05 < held < 1.05 * stored


def packed_layers() -> list[PackedRows]:
    return [layer for layer in gc.get_objects() if type(layer) in (PackedLinear, PackedRows)]


def test_loading_holds_at_most_one_group_twice(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the rows of a group are copied, all other layers in memory belong to the final model."""
    quantized = quantize(wide, tmp_path / "out")
    stacked = PackedRows.stacked
    not_stacked: list[list[weakref.ref[PackedRows]]] = []

    def recorded(layers: Sequence[PackedRows]) -> PackedRows:
        gc.collect()
        alive = packed_layers()
        assert {id(layer) for layer in layers} <= {id(layer) for layer in alive}
        others = [*layers, *before]
        not_stacked.append([weakref.ref(layer) for layer in alive if not any(layer is other for other in others)])
        return stacked(layers)

    gc.collect()
    before = packed_layers()  # of models that other tests keep
    monkeypatch.setattr(PackedRows, "stacked", recorded)
    model, _ = llmq.load(quantized)
    staying = {id(module) for module in model.modules() if isinstance(module, PackedRows)}
    assert [len(layers) for layers in not_stacked] == [0, 2, 4, 6]  # per block: qkv, o, then gate and up, down
    assert all(id(reference()) in staying for layers in not_stacked for reference in layers)

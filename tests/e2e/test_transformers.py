"""`llmq.enable_transformers`: `from_pretrained` and `save_pretrained` of transformers with the kernels of llmq.

Logits are compared with `llmq.load`, which other tests compare with float models.
"""

import copy
import gc
import io
import json
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import llmq
from llmq.errors import CheckpointError, FormatError, UnsupportedModelError
from llmq.model.experts.stacking import Form, form_of
from llmq.runtime import packed_experts
from llmq.runtime.fused_linear import FusedLinear
from llmq.runtime.packed_experts import PackedExperts
from llmq.runtime.packed_linear import PackedLinear
from llmq.runtime.transformers import placement, quantizer
from llmq.runtime.transformers.stored_linear import StoredLinear
from tests import builders, foreign, mixtures
from tests.runs import tensors_of

GPTQ, AWQ, PACKED = "gptq", "awq", "compressed-tensors"
LAYOUTS = [(GPTQ, True), (GPTQ, False), (AWQ, False), (PACKED, True), (PACKED, False)]
Quantize = Callable[..., Path]


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    llmq.enable_transformers()
    yield
    llmq.disable_transformers()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """`quantized("llama", "gptq", symmetric=True)`: a tiny checkpoint, rounded to nearest, created once."""
    made: dict[tuple[str, str, bool, str], Path] = {}

    def make(name: str, layout: str, *, symmetric: bool = True, dtype: str = "bfloat16") -> Path:
        key = (name, layout, symmetric, dtype)
        if key not in made:
            dense = builders.CONFIGS.get(name)
            config = mixtures.CONFIGS[name]() if dense is None else dense(num_hidden_layers=2)
            folder = tmp_path_factory.mktemp(name)
            builders.save_model(folder / "model", builders.causal_model(config, dtype=dtype))
            made[key] = folder / "out"
            settings: dict[str, Any] = {"method": "rtn", "scales": "minmax", "group_size": 16}
            llmq.quantize(str(folder / "model"), made[key], format=layout, symmetric=symmetric, **settings)
        return made[key]

    return make


def read(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(builders.tokens(2, 12) if tokens is None else tokens).logits
    return output


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def assert_saved_again(model: Any, source: Path, out: Path) -> None:
    """Check that `save_pretrained` writes the tensors and the configuration of the source."""
    model.save_pretrained(out)
    saved, expected = tensors_of(out), tensors_of(source)
    assert sorted(saved) == sorted(expected)
    for name, tensor in expected.items():
        assert saved[name].dtype == tensor.dtype, name
        assert saved[name].equal(tensor), name
    assert config_of(out) == config_of(source)


# ---- the registries of transformers


def tables() -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)


def test_enabling_can_be_undone_and_repeated() -> None:
    llmq.disable_transformers()
    before = tables()
    llmq.disable_transformers()
    assert tables() == before
    llmq.enable_transformers()
    once = tables()
    for old, new in zip(before, once, strict=True):
        changed = {method for method in old if old[method] is not new[method]}
        assert changed == {"auto-round", "awq", "compressed-tensors", "gptq"}
    llmq.enable_transformers()
    assert tables() == once
    llmq.disable_transformers()
    assert tables() == before


def test_later_registrations_of_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    other = auto.AUTO_QUANTIZER_MAPPING["quanto"]
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "gptq", other)
    llmq.disable_transformers()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is other


# ---- loading, running, saving


@pytest.mark.parametrize(("layout", "symmetric"), LAYOUTS)
def test_a_model_equals_that_of_llmq_load_and_is_saved_unchanged(
    layout: str, symmetric: bool, quantized: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gptqmodel", "awq", "optimum", "auto_round", "compressed_tensors"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    source = quantized("llama", layout, symmetric=symmetric)
    model = read(source)
    assert count(model, PackedLinear) == 14
    assert model.dtype == torch.bfloat16
    assert logits(model).equal(logits(llmq.load(source, dtype=torch.bfloat16)[0]))
    assert_saved_again(model, source, tmp_path / "saved")
    assert logits(read(tmp_path / "saved")).equal(logits(model))


@pytest.mark.parametrize("name", ["neox", "phi3", "gemma3"])
def test_other_architectures(name: str, quantized: Quantize, tmp_path: Path) -> None:
    """Biases and different names on disk, fused weights, tied embeddings."""
    source = quantized(name, GPTQ)
    model = read(source, dtype=torch.float32)
    assert logits(model).equal(logits(llmq.load(source)[0]))
    assert_saved_again(model, source, tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "layout"), [("mixtral", GPTQ), ("mixtral", PACKED), ("qwen3_moe", PACKED), ("gpt_oss", GPTQ)]
)
def test_mixtures_of_experts(name: str, layout: str, quantized: Quantize, tmp_path: Path) -> None:
    """Compared without fused layers. Outputs of fused layers are slices, and on a CPU with AVX-512 the SiLU of torch
    processes 32 of their 48 channels as vectors and the others one by one, which differs in the last bits."""
    source = quantized(name, layout)
    model = read(source, dtype=torch.float32)
    loaded = llmq.load(source, fuse=False)[0]
    assert count(model, PackedExperts) == count(loaded, PackedExperts) > 0
    assert logits(model).equal(logits(loaded))
    assert_saved_again(model, source, tmp_path / "saved")


def test_transposed_weights(tmp_path: Path) -> None:
    """The layers of GPT-2 are not nn.Linear, and its float layers are (K, N) on disk."""
    sizes = {"vocab_size": builders.VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    source = builders.save_model(tmp_path / "source", builders.causal_model(config, dtype="float16"))
    settings: dict[str, Any] = {"method": "rtn", "scales": "minmax", "group_size": 16, "skip": ["c_proj"]}
    llmq.quantize(str(source), tmp_path / "out", format=GPTQ, **settings)
    model, loaded = read(tmp_path / "out", dtype=torch.float32), llmq.load(tmp_path / "out")[0]
    assert count(model, PackedLinear) == 2
    assert logits(model).equal(logits(loaded))
    for number, candidate in enumerate((model, loaded)):
        assert_saved_again(candidate, tmp_path / "out", tmp_path / f"saved{number}")


def test_files_of_more_than_one_dtype(quantized: Quantize, tmp_path: Path) -> None:
    """Some tools declare float16 and store the rest in float32; tensors with unchanged values keep their dtype."""
    folder = shutil.copytree(quantized("llama", GPTQ, dtype="float16"), tmp_path / "copy")
    tensors = {name: t.float() if name.endswith("norm.weight") else t for name, t in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = read(folder)
    assert model.model.norm.weight.dtype == torch.float16
    assert_saved_again(model, folder, tmp_path / "saved")


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_model_loaded_by_llmq_is_saved(name: str, quantized: Quantize, tmp_path: Path) -> None:
    source = quantized(name, GPTQ)
    model, _ = llmq.load(source)
    assert count(model, FusedLinear) > 0
    assert_saved_again(model, source, tmp_path / "saved")


def test_a_model_whose_folder_is_gone_is_packed_again(quantized: Quantize, tmp_path: Path) -> None:
    source = shutil.copytree(quantized("llama", GPTQ), tmp_path / "copy")
    model = read(source)
    shutil.rmtree(source)
    assert_saved_again(model, quantized("llama", GPTQ), tmp_path / "saved")


def test_changes_in_memory_are_saved(quantized: Quantize, tmp_path: Path) -> None:
    source = quantized("llama", GPTQ)
    model = read(source, dtype=torch.float32)
    model.get_submodule("model.layers.0.mlp.down_proj").scales.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    assert logits(read(tmp_path / "saved", dtype=torch.float32)).equal(logits(model))
    name = "model.layers.0.mlp.down_proj.scales"
    assert tensors_of(tmp_path / "saved")[name].equal(2 * tensors_of(source)[name])


def test_a_model_can_be_copied_and_pickled(quantized: Quantize, tmp_path: Path) -> None:
    source = quantized("llama", GPTQ)
    model = read(source)
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    for number, copied in enumerate((copy.deepcopy(model), torch.load(written, weights_only=False))):
        assert logits(copied).equal(logits(model))
        assert_saved_again(copied, source, tmp_path / str(number))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_cast_does_not_change_the_scales(name: str, quantized: Quantize, tmp_path: Path) -> None:
    source = quantized(name, PACKED, dtype="float32")
    model = read(source).to(torch.bfloat16)
    layer = model.get_submodule("model.layers.0.self_attn.o_proj")
    assert (layer.compute_dtype, layer.scales.dtype) == (torch.bfloat16, torch.float32)
    model = read(source).double().to(torch.float32)
    assert_saved_again(model, source, tmp_path / "saved")


def test_greedy_text_equals_that_of_llmq_load(quantized: Quantize) -> None:
    source = quantized("llama", AWQ, symmetric=False)
    settings = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False}
    tokens = builders.tokens(1, 6)
    written = read(source, dtype=torch.float32).generate(tokens, **settings)
    assert written.equal(llmq.load(source)[0].generate(tokens, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, quantized: Quantize) -> None:
    """Parameters with another name on disk get the requested dtype, also in old versions of transformers."""
    for name in ("llama", "mixtral"):
        model = read(quantized(name, GPTQ), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert logits(model).dtype == dtype


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_device_maps(name: str, quantized: Quantize) -> None:
    source = quantized(name, PACKED, symmetric=False)
    expected = logits(read(source, dtype=torch.float32))
    for device_map in ("auto", {"": "cpu"}):
        model = read(source, dtype=torch.float32, device_map=device_map)
        assert count(model, StoredLinear) == 0
        assert logits(model).equal(expected)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_offloading(name: str, quantized: Quantize, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Offloaded layers are dequantized at every call, which is logged."""
    source = quantized(name, GPTQ, dtype="float32")
    expected = logits(read(source))
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = read(source, device_map=device_map, offload_folder=str(tmp_path / "offloaded"))
    assert count(model, StoredLinear) > 0
    assert count(model, PackedLinear) > 0
    assert "are dequantized at every call" in caplog.text
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-4 * float(expected.std()))
    if name == "llama":  # old transformers does not save offloaded weights with other names on disk
        with pytest.warns(UserWarning, match="offloaded modules"):
            assert_saved_again(model, source, tmp_path / "saved")


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_stored_layers_are_freed_when_they_are_packed(
    name: str, hooked: bool, quantized: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed model is never in memory twice during loading, without the help of garbage collection."""
    made: weakref.WeakSet[StoredLinear] = weakref.WeakSet()
    alive: list[int] = []  # number of stored layers as each module is packed
    make, pack = StoredLinear.__init__, placement._run_packed_at

    def noted(self: StoredLinear, *arguments: Any, **settings: Any) -> None:
        make(self, *arguments, **settings)
        made.add(self)

    def counted(model: nn.Module, path: str) -> bool:
        alive.append(len(made))
        return pack(model, path)

    monkeypatch.setattr(StoredLinear, "__init__", noted)
    monkeypatch.setattr(placement, "_run_packed_at", counted)
    device_map = {"model": "cpu", "lm_head": "disk"} if hooked else None
    gc.collect()
    gc.disable()
    try:
        model = read(quantized(name, GPTQ), device_map=device_map, offload_folder=str(tmp_path))
        assert len(made) == 0
    finally:
        gc.enable()
    dense = 14 if name == "llama" else 8
    assert alive[:dense] == list(range(alive[0], alive[0] - dense, -1))
    assert count(model, PackedLinear) == dense


def test_the_form_of_experts_is_detected_before_loading(quantized: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form is detected with a tensor on the CPU, and loaded modules may be on other devices."""
    asked: list[str] = []
    run_packed = placement.run_packed

    def noted(module: nn.Module) -> Form | None:
        asked.append(type(module).__name__)
        return form_of(module)

    def run_noted(model: nn.Module) -> list[str]:
        monkeypatch.setattr(packed_experts, "form_of", noted)
        return run_packed(model)

    monkeypatch.setattr(quantizer, "run_packed", run_noted)
    assert count(read(quantized("mixtral", GPTQ)), PackedExperts) == 2
    assert asked == []


def bytes_for_codes(source: Path, where: Path, left: str = "lm_head") -> tuple[Path, Path]:
    """A checkpoint with quantized values in `.weight`, one byte each, and its float twin."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }

    def pack(name: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor] | None:
        if (
            left in name
            or len(shape) != 2
            or not name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))
        ):
            return None
        w = foreign.weight(8, (shape[0], shape[1]), shape[1], symmetric=True)
        return {name: torch.from_numpy((w.codes - 128).astype("int8")), f"{name}_scale": w.scales}, w.exact

    return foreign.replaced(source, where, settings, pack)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_int_quantized_checkpoints_of_one_byte_per_value(name: str, tmp_path: Path) -> None:
    config = mixtures.CONFIGS[name]() if name == "mixtral" else builders.llama(num_hidden_layers=2)
    source = builders.save_model(tmp_path / "source", builders.causal_model(config))
    packed, floats = bytes_for_codes(source, tmp_path)
    model, expected = read(packed, dtype=torch.float32), logits(read(floats, dtype=torch.float32))
    assert count(model, PackedExperts) == (2 if name == "mixtral" else 0)
    assert count(model, StoredLinear) == 0
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert_saved_again(model, packed, tmp_path / "saved")


def test_a_model_compiles_to_one_graph(quantized: Quantize) -> None:
    model = read(quantized("llama", GPTQ), dtype=torch.float32)
    del model.model.layers[1:]  # one layer is enough, in half the time
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


# ---- files of other tools


@pytest.mark.parametrize(
    "name", ["gptqmodel-gptq-sym-g128", "gptqmodel-awq-gemm-asym-g32", "llmcompressor-ct-w4a16-sym-g128"]
)
def test_golden_checkpoints(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "golden" / name
    expected = load_file(folder / "expected.safetensors")
    model = read(folder, dtype=torch.float32)
    difference = logits(model, expected["__input_ids__"]) - expected["__logits__"].to(torch.float32)
    assert float(difference.abs().max()) <= 0.05  # half-precision rounding; see test_load.py
    model.save_pretrained(tmp_path)
    saved, stored = tensors_of(tmp_path), load_file(folder / "model.safetensors")
    assert sorted(saved) == sorted(stored)
    assert all(saved[name].dtype == tensor.dtype and saved[name].equal(tensor) for name, tensor in stored.items())


def test_auto_round(quantized: Quantize, tmp_path: Path) -> None:
    """The auto-round format: the first version of gptq without g_idx, under a different name."""
    source, folder = quantized("llama", GPTQ), tmp_path / "auto-round"
    shutil.copytree(source, folder)
    kept = {name: tensor for name, tensor in tensors_of(source).items() if not name.endswith(".g_idx")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 16}
    builders.change_json(folder / "config.json", quantization_config={**settings, "sym": True, "data_type": "int"})
    model = read(folder, dtype=torch.float32)
    assert logits(model).equal(logits(read(source, dtype=torch.float32)))
    assert_saved_again(model, folder, tmp_path / "saved")


def floats_of_four_bits(source: Path, where: Path) -> tuple[Path, Path]:
    """A checkpoint in the nvfp4 format of compressed-tensors, and its float twin."""
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }

    def pack(name: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor] | None:
        if not name.endswith("_proj.weight") or len(shape) != 2:
            return None
        tensors, weight = foreign.fp4("nvfp4", (shape[0], shape[1]))
        return {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in tensors.items()}, weight

    return foreign.replaced(source, where, settings, pack)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_fp4_models_run_dequantized(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = mixtures.qwen3_moe() if name == "qwen3_moe" else builders.llama(num_hidden_layers=2)
    source = builders.save_model(tmp_path / "source", builders.causal_model(config))
    packed, floats = floats_of_four_bits(source, tmp_path)
    model, expected = read(packed, dtype=torch.float32), logits(read(floats, dtype=torch.float32))
    assert "are dequantized at every call" in caplog.text
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert_saved_again(model, packed, tmp_path / "saved")


def test_a_dequantized_model_is_saved_only_where_possible(tmp_path: Path) -> None:
    for name, config in (("dense", builders.llama(num_hidden_layers=2)), ("mixture", mixtures.qwen3_moe())):
        source = builders.save_model(tmp_path / name / "source", builders.causal_model(config))
        packed, _ = floats_of_four_bits(source, tmp_path / name)
        model, _ = llmq.load(packed)
        if name == "dense":
            assert_saved_again(model, packed, tmp_path / "saved")
        else:
            with pytest.raises(FormatError, match=r"experts.*was dequantized during loading") as caught:
                model.save_pretrained(tmp_path / "refused")
            assert "enable_transformers" in caught.value.hint


# ---- errors


def test_quantized_and_float_experts_of_one_name_are_refused(tmp_path: Path) -> None:
    source = builders.save_model(tmp_path / "source", builders.causal_model(mixtures.CONFIGS["mixtral"]()))
    packed, _ = bytes_for_codes(source, tmp_path, left="layers.1.")
    with pytest.raises(FormatError, match=r"layers\.0\..* holds quantized values, but .*layers\.1\.") as caught:
        read(packed)
    assert "llmq.load" in caught.value.hint
    assert count(llmq.load(packed)[0], PackedExperts) == 1


def test_nothing_is_quantized_while_loading(checkpoint: Callable[..., Path]) -> None:
    asked = transformers.AutoRoundConfig(bits=4)
    with pytest.raises(FormatError, match="not quantized, but loading requests auto-round") as caught:
        read(checkpoint("llama"), quantization_config=asked)
    assert "llmq quantize" in caught.value.hint


def test_the_config_of_the_checkpoint_overrides_the_users(quantized: Quantize) -> None:
    with pytest.warns(UserWarning, match="from the model will be used"):
        model = read(quantized("llama", GPTQ), quantization_config=transformers.GPTQConfig(bits=4))
    assert count(model, PackedLinear) == 14


def test_an_unsupported_format_is_refused_before_building(quantized: Quantize, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("llama", GPTQ), tmp_path / "copy")
    builders.change_json(
        folder / "config.json", quantization_config={**config_of(folder), "checkpoint_format": "marlin"}
    )
    with pytest.raises(FormatError, match="marlin") as caught:
        read(folder)
    assert "disable_transformers" in caught.value.hint


def test_packed_weights_without_a_layer_are_refused(quantized: Quantize, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("llama", GPTQ), tmp_path / "copy")
    builders.change_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"holds the block model\.layers\.1 .*config\.json has fewer blocks"):
        read(folder)


def test_tensors_without_a_file_are_refused(quantized: Quantize) -> None:
    config = transformers.AutoConfig.from_pretrained(quantized("llama", GPTQ))
    with pytest.raises(FormatError, match="expected packed safetensors files"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


# ---- `.weight` of a packed layer


def test_a_weight_can_be_read_but_not_changed(quantized: Quantize) -> None:
    layer = read(quantized("llama", GPTQ), dtype=torch.float32).get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, PackedLinear)
    assert (layer.weight.shape, layer.weight.dtype) == ((32, 64), torch.float32)
    expected = layer.quantized().dequantize()
    assert (layer.weight + 0).equal(expected)
    assert layer.weight.norm(dim=1).equal(expected.norm(dim=1))
    for change in (lambda weight: weight.data.add_(1), lambda weight: setattr(weight, "data", expected)):
        with pytest.raises(UnsupportedModelError, match="cannot be changed"):
            change(layer.weight)
    assert layer.weight.norm().equal(expected.norm())

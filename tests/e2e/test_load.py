"""`llmq.load`: a packed model equals the float model with the dequantized weights, and stays packed.

Tolerance: the float twin runs in float64 and in the dtype of the packed model; the difference is the rounding error of
the twin. The packed model computes the same sums in a different order, so its mean error may be a few times as large.
(Means are compared because the largest error comes from a single token with nearly equal attention scores.) In float32
a wrong quantized value, zero point or scale causes an error a thousand times as large.
"""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError, FormatError
from llmq.numerics.scheme import BITS
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.runtime.packed_linear import PackedLinear
from tests import architectures, builders, foreign

Checkpoints = Callable[..., Path]
ROUNDING = 4  # largest ratio of the error of the packed model to the rounding error of the twin
CASES = [
    *(("compressed-tensors", bits, symmetric) for bits in BITS for symmetric in (True, False)),
    *(("gptq", bits, symmetric) for bits in (4, 8) for symmetric in (True, False)),
    *(("awq", 4, symmetric) for symmetric in (True, False)),
]


def quantize(model: Path, out: Path, **settings: Any) -> Path:
    """Quantize by rounding to nearest, which is enough to test loading."""
    llmq.quantize(str(model), out, **{"method": "rtn", "scales": "minmax", "group_size": 32, **settings})
    return out


def twin(model: Path, quantized: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers with the dequantized weights of the quantized file."""
    float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    weights = dict(llmq.dequantize(quantized))
    assert weights
    for name, weight in weights.items():
        parameter = float_model.get_parameter(name)
        assert not weight.equal(parameter), f"{name} is not quantized"
        parameter.data.copy_(weight)
    return float_model.to(dtype)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(tokens).logits
    return output


def assert_equal_but_for_rounding(model: Path, quantized: Path, dtype: torch.dtype = torch.float32) -> None:
    tokens = builders.tokens(2, 12)
    exact = logits(twin(model, quantized, torch.float64), tokens)
    allowed = ROUNDING * float((logits(twin(model, quantized, dtype), tokens) - exact).abs().mean())
    loaded, _ = llmq.load(quantized, dtype=dtype)
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    output = logits(loaded, tokens)
    assert output.dtype == dtype
    assert allowed < 0.2 * float(exact.std()), "the tolerance is too large to detect an error"
    assert float((output - exact).abs().mean()) <= allowed


@pytest.mark.parametrize(("layout", "bits", "symmetric"), CASES)
def test_logits_are_those_of_the_float_twin(
    layout: str, bits: int, symmetric: bool, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    model = checkpoint("llama", num_hidden_layers=1)
    quantized = quantize(model, tmp_path / "out", format=layout, bits=bits, symmetric=symmetric)
    assert_equal_but_for_rounding(model, quantized)


@pytest.mark.parametrize("group_size", [16, "channel", "tensor"])
def test_logits_of_other_groupings(group_size: int | str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("llama", num_hidden_layers=1)
    assert_equal_but_for_rounding(model, quantize(model, tmp_path / "out", group_size=group_size))


@pytest.mark.parametrize("architecture", ["stablelm", "neox", "phi3", "gemma3", "qwen3"])
def test_logits_of_other_architectures(architecture: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Biases (stablelm, neox), fused weights (phi3, neox), tied embeddings and windows (gemma3), norms per head."""
    model = checkpoint(architecture)
    assert_equal_but_for_rounding(model, quantize(model, tmp_path / "out"))


def test_tied_embeddings_are_stored_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    quantized = quantize(model, tmp_path / "out")
    assert_equal_but_for_rounding(model, quantized)
    loaded, _ = llmq.load(quantized)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_bfloat16_model(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("llama", num_hidden_layers=1, dtype="bfloat16")
    quantized = quantize(model, tmp_path / "out")
    assert_equal_but_for_rounding(model, quantized, torch.bfloat16)
    assert_equal_but_for_rounding(model, quantized, torch.float32)
    loaded, _ = llmq.load(quantized, device="cpu")
    assert loaded.dtype == torch.float32  # the default on a CPU, where half precision is slow
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.scales.dtype == torch.bfloat16  # as stored: only the product uses another dtype


def test_a_float_model_is_loaded_unchanged(checkpoint: Checkpoints) -> None:
    model = checkpoint("llama")
    tokens = builders.tokens(1, 8)
    loaded, tokenizer = llmq.load(model)
    assert logits(loaded, tokens).equal(logits(AutoModelForCausalLM.from_pretrained(model), tokens))
    assert tokenizer("a").input_ids == [1, len(builders.SPECIAL) + 64]  # <s>, and the index of "a" among the bytes


# ---- memory

MIXED = ["q_proj:bits=2", "k_proj:bits=3", "v_proj:bits=8", "gate_proj:bits=3,symmetric=false", "up_proj:bits=2"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 2, 3, 4 and 8 bits; in_features are multiples of 128, so packed rows have no padding."""
    folder = tmp_path_factory.mktemp("mixed")
    config = LlamaConfig(**{**builders.GROUPED, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2})
    model = builders.save_model(folder / "model", builders.causal_model(config))
    return quantize(model, folder / "out", group_size=64, overrides=MIXED)


def held(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, one tensor per storage."""
    tensors = [*model.parameters(), *model.buffers()]
    yield from {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values()


def test_a_mixed_model_stays_packed_at_every_width(mixed: Path) -> None:
    model, _ = llmq.load(mixed)
    tokens = builders.tokens(1, 8)
    assert logits(model, tokens).isfinite().all()  # include caches of the first forward
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {module.scheme.bits for module in packed.values()} == {2, 3, 4, 8}
    assert len(packed) == 14

    codes = sum(layer.out_features * layer.in_features * layer.scheme.bits // 8 for layer in packed.values())
    groups = {name: layer.out_features * layer.in_features // 64 for name, layer in packed.items()}
    scales = 4 * sum(groups.values())  # float32, the dtype of the model
    zeros = sum(2 * groups[name] for name, layer in packed.items() if not layer.scheme.symmetric)
    stored = load_file(mixed / "model.safetensors")
    rest = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith(".weight"))
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    assert rotary <= 256  # two tables of half the head size
    assert sum(tensor.untyped_storage().nbytes() for tensor in held(model)) <= codes + scales + zeros + rest + rotary


def live_tensors() -> dict[int, Tensor]:
    gc.collect()
    return {id(tensor): tensor for tensor in gc.get_objects() if issubclass(type(tensor), Tensor)}


def test_no_float_copy_of_a_weight_exists(mixed: Path) -> None:
    before = live_tensors()
    model, _ = llmq.load(mixed)
    logits(model, builders.tokens(1, 8))
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    sizes = {layer.out_features * layer.in_features for layer in layers}
    new = [tensor for key, tensor in live_tensors().items() if key not in before]
    assert sum(tensor is layer.words for tensor in new for layer in layers) == len(layers)  # the search finds tensors
    copies = [tensor.shape for tensor in new if tensor.is_floating_point() and tensor.numel() in sizes]
    assert copies == []


# ---- generation


@pytest.fixture(scope="module")
def pair(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The packed model and its float twin."""
    model = checkpoint("llama")
    quantized = quantize(model, tmp_path_factory.mktemp("pair") / "out")
    return llmq.load(quantized)[0], twin(model, quantized)


def generate(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    settings = {"do_sample": False, "attention_mask": torch.ones_like(tokens), **options}
    with torch.inference_mode():
        generated: Tensor = model.generate(tokens, min_new_tokens=16, max_new_tokens=16, **settings)
    return generated[:, tokens.shape[1] :]


def test_greedy_text_is_that_of_the_float_twin(pair: tuple[Any, Any]) -> None:
    packed, float_twin = pair
    tokens = builders.tokens(2, 6)
    written = generate(packed, tokens)
    assert written.equal(generate(float_twin, tokens))
    assert len(written[0].unique()) > 3  # not a repetition of one token


def test_the_cache_does_not_change_the_text(pair: tuple[Any, Any]) -> None:
    packed, _ = pair
    tokens = builders.tokens(2, 6)
    assert packed.config.use_cache
    assert generate(packed, tokens).equal(generate(packed, tokens, use_cache=False))


def test_a_padded_batch_generates_the_text_of_single_prompts(pair: tuple[Any, Any]) -> None:
    packed, _ = pair
    long, short = builders.tokens(1, 9, seed=1), builders.tokens(1, 4, seed=2)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], dim=1)
    batch = torch.cat([long, padded])
    mask = (torch.arange(9) >= torch.tensor([[0], [5]])).long()
    written = generate(packed, batch, attention_mask=mask)
    assert written[:1].equal(generate(packed, long))
    assert written[1:].equal(generate(packed, short))


def test_sampling_follows_the_seed(pair: tuple[Any, Any]) -> None:
    packed, _ = pair

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return generate(packed, builders.tokens(1, 6), do_sample=True, temperature=1.5)

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


def test_generation_settings_of_the_model_are_kept(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", num_hidden_layers=1), tmp_path / "out")
    builders.change_json(quantized / "generation_config.json", max_new_tokens=3, eos_token_id=[2, 7])
    loaded, _ = llmq.load(quantized)
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generation_config.eos_token_id == [2, 7]


# ---- files of other tools

FOREIGN = ("gptqmodel-gptq-sym-g128", "gptqmodel-awq-gemm-asym-g32", "llmcompressor-ct-w4a16-sym-g128")


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_checkpoints_run(shared: Path, name: str) -> None:
    """The reference logits come from a half-precision forward.

    About thirty operations per logit are rounded in half precision, with an error of 2**-11 of values around 10; in
    total sqrt(30) * 10 / 2048 = 0.03. The note in the files allows 0.05. The spread of the logits is much larger.
    """
    expected = load_file(shared / "golden" / name / "expected.safetensors")
    model, tokenizer = llmq.load(shared / "golden" / name, dtype=torch.float32)
    ours = logits(model, expected["__input_ids__"])
    theirs = expected["__logits__"].to(torch.float32)
    assert float((ours - theirs).abs().max()) <= 0.05
    assert float(theirs.std()) > 0.2
    assert tokenizer("text").input_ids


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_weights_are_dequantized_exactly(shared: Path, name: str) -> None:
    expected = load_file(shared / "golden" / name / "expected.safetensors")
    weights = dict(llmq.dequantize(shared / "golden" / name))
    compared = [key for key in expected if not key.startswith("__")]
    assert len(compared) == 7
    for key in compared:
        assert weights[key].dtype == torch.float32
        assert weights[key].to(expected[key].dtype).equal(expected[key]), key


def move_settings(folder: Path, place: str) -> None:
    """Move quantization_config from config.json to the place that another writer uses."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    settings = config.pop("quantization_config")
    if place.endswith(".json"):
        (folder / place).write_text(json.dumps(settings), encoding="utf-8")
    elif place == "text_config":
        config["text_config"]["quantization_config"] = settings
    else:
        config[place] = settings
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("gptq", "quantize_config.json"),
        ("awq", "quant_config.json"),
        ("compressed-tensors", "compression_config"),
        ("gptq", "text_config"),
    ],
)
def test_settings_in_other_places_are_read(layout: str, place: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Saving writes the settings into config.json."""
    model, tokens = checkpoint("llama", num_hidden_layers=1), builders.tokens(1, 8)
    if place == "text_config":  # the language model of a vision-language model
        model = builders.save_model(tmp_path / "llava", builders.causal_model(architectures.tiny("llava")))
    quantized = quantize(model, tmp_path / "out", format=layout, symmetric=layout != "awq")
    expected = logits(llmq.load(quantized)[0], tokens)
    for name in ("quantize_config.json", "quant_config.json"):
        (quantized / name).unlink(missing_ok=True)
    move_settings(quantized, place)
    loaded, tokenizer = llmq.load(quantized)
    assert logits(loaded, tokens).equal(expected)
    for part in (loaded, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    assert logits(llmq.load(tmp_path / "saved")[0], tokens).equal(expected)


@pytest.mark.parametrize(("in_order", "packed"), [(True, 7), (False, 0)])
def test_uneven_groups_with_act_order_run_dequantized(
    in_order: bool, packed: int, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Groups of 96 adjacent columns are split into three of 32; groups of scattered columns cannot be split."""
    source = checkpoint("llama", num_hidden_layers=1, hidden_size=192, intermediate_size=192)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 96, "sym": False, "desc_act": not in_order}

    def pack(name: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor] | None:
        if not name.endswith("_proj.weight"):
            return None
        weight = foreign.weight(4, (shape[0], shape[1]), 96, shuffled=not in_order)
        module = name.removesuffix(".weight")
        return {f"{module}.{suffix}": t for suffix, t in foreign.gptq(weight, 1).items()}, weight.exact

    folder, floats = foreign.replaced(source, tmp_path, settings, pack)
    loaded, _ = llmq.load(folder, fuse=False)
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == packed
    tokens = builders.tokens(1, 8)
    expected = logits(AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32), tokens)
    assert torch.allclose(logits(loaded, tokens), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_stored_shapes_are_read_once(checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    quantized = quantize(checkpoint("llama", num_hidden_layers=1), tmp_path / "out")
    weights = PackedWeights(Checkpoint.open(quantized))
    original = Checkpoint.tensor

    def noted(self: Checkpoint, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    for module in weights.modules:
        assert weights.is_affine(module)
        assert weights.shape(module) == weights.shape(module)
    assert sorted(read) == sorted(f"{module}.weight_shape" for module in weights.modules)


# ---- files that do not fit


def test_packed_weights_without_a_layer_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", num_hidden_layers=2), tmp_path / "out")
    builders.change_json(quantized / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"holds the block model\.layers\.1 .*config\.json has fewer blocks"):
        llmq.load(quantized)


def test_a_layer_without_weights_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", num_hidden_layers=1), tmp_path / "out")
    builders.change_json(quantized / "config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"needs the tensor model\.layers\.1"):
        llmq.load(quantized)


def test_dequantizing_a_float_model_is_refused(checkpoint: Checkpoints) -> None:
    with pytest.raises(FormatError, match="is not quantized"):
        dict(llmq.dequantize(checkpoint("llama")))

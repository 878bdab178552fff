"""`llmq.load`: a packed model computes what the float model with the dequantized weights computes, and stays packed.

How near is near?  The twin runs in float64 and in the dtype of the packed model.  There it is off by its own
rounding; the packed model does the same sums in another order, so its mean error may be a few times that, and no more.
(Means: the largest error is that of the one token whose attention was undecided.)  In float32 a wrong code, zero or
scale costs a thousand times as much.
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
ROUNDING = 4  # how many times the twin's rounding the packed model's may be
CASES = [
    *(("compressed-tensors", bits, symmetric) for bits in BITS for symmetric in (True, False)),
    *(("gptq", bits, symmetric) for bits in (4, 8) for symmetric in (True, False)),
    *(("awq", 4, symmetric) for symmetric in (True, False)),
]


def quantize(model: Path, out: Path, **settings: Any) -> Path:
    """By rounding to nearest, which is all that loading cares about."""
    llmq.quantize(str(model), out, **{"method": "rtn", "scales": "minmax", "group_size": 32, **settings})
    return out


def twin(model: Path, quantized: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of the original, with the weights that the quantized file stands for."""
    float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    weights = dict(llmq.dequantize(quantized))
    assert weights
    for name, weight in weights.items():
        parameter = float_model.get_parameter(name)
        assert not weight.equal(parameter), f"{name} was not rounded at all"
        parameter.data.copy_(weight)
    return float_model.to(dtype)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


def assert_equal_but_for_rounding(model: Path, quantized: Path, dtype: torch.dtype = torch.float32) -> None:
    tokens = builders.tokens(2, 12)
    exact = logits(twin(model, quantized, torch.float64), tokens)
    allowed = ROUNDING * float((logits(twin(model, quantized, dtype), tokens) - exact).abs().mean())
    loaded, _ = llmq.load(quantized, dtype=dtype)
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    found = logits(loaded, tokens)
    assert found.dtype == dtype
    assert allowed < 0.2 * float(exact.std()), "the yardstick is too long to measure anything"
    assert float((found - exact).abs().mean()) <= allowed


@pytest.mark.parametrize(("layout", "bits", "symmetric"), CASES)
def test_logits(layout: str, bits: int, symmetric: bool, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("llama", num_hidden_layers=1)
    quantized = quantize(model, tmp_path / "out", format=layout, bits=bits, symmetric=symmetric)
    assert_equal_but_for_rounding(model, quantized)


@pytest.mark.parametrize("group_size", [16, "channel", "tensor"])
def test_logits_of_other_groupings(group_size: int | str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint("llama", num_hidden_layers=1)
    assert_equal_but_for_rounding(model, quantize(model, tmp_path / "out", group_size=group_size))


@pytest.mark.parametrize("architecture", ["stablelm", "neox", "phi3", "gemma3", "qwen3"])
def test_logits_of_other_architectures(architecture: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Biases (stablelm, neox), fused weights (phi3, neox), tied embeddings and windows (gemma3), norms on heads."""
    model = checkpoint(architecture)
    assert_equal_but_for_rounding(model, quantize(model, tmp_path / "out"))


def test_tied_embeddings_are_held_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
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
    assert loaded.dtype == torch.float32  # half precision is slow on a CPU, so nobody gets it unasked
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.scales.dtype == torch.bfloat16  # as stored: only the product is computed in another dtype


def test_a_float_model_is_loaded_as_it_is(checkpoint: Checkpoints) -> None:
    model = checkpoint("llama")
    tokens = builders.tokens(1, 8)
    loaded, tokenizer = llmq.load(model)
    assert logits(loaded, tokens).equal(logits(AutoModelForCausalLM.from_pretrained(model), tokens))
    assert tokenizer("a").input_ids == [1, len(builders.SPECIAL) + 64]  # <s>, and "a" as the alphabet of bytes sorts it


# ---- memory

MIXED = ["q_proj:bits=2", "k_proj:bits=3", "v_proj:bits=8", "gate_proj:bits=3,symmetric=false", "up_proj:bits=2"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2, 3, 4 and 8 bits side by side; in_features are multiples of 128, so packed rows have no padding."""
    folder = tmp_path_factory.mktemp("mixed")
    config = LlamaConfig(**{**builders.GROUPED, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2})
    model = builders.save_model(folder / "model", builders.causal_model(config))
    return quantize(model, folder / "out", group_size=64, overrides=MIXED)


def held(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer, one for each piece of memory."""
    tensors = [*model.parameters(), *model.buffers()]
    yield from {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values()


def test_a_mixed_model_stays_packed_at_every_width(mixed: Path) -> None:
    model, _ = llmq.load(mixed)
    tokens = builders.tokens(1, 8)
    assert logits(model, tokens).isfinite().all()  # whatever the first forward caches counts as well
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {module.scheme.bits for module in packed.values()} == {2, 3, 4, 8}
    assert len(packed) == 14

    codes = sum(layer.out_features * layer.in_features * layer.scheme.bits // 8 for layer in packed.values())
    groups = {name: layer.out_features * layer.in_features // 64 for name, layer in packed.items()}
    scales = 4 * sum(groups.values())  # float32, as the model is
    zeros = sum(2 * groups[name] for name, layer in packed.items() if not layer.scheme.symmetric)
    stored = load_file(mixed / "model.safetensors")
    rest = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith(".weight"))
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    assert rotary <= 256  # two tables of half a head
    assert sum(tensor.untyped_storage().nbytes() for tensor in held(model)) <= codes + scales + zeros + rest + rotary


def live_tensors() -> dict[int, Tensor]:
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)}


def test_no_float_copy_of_a_weight_exists_anywhere(mixed: Path) -> None:
    before = live_tensors()
    model, _ = llmq.load(mixed)
    logits(model, builders.tokens(1, 8))
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    sizes = {layer.out_features * layer.in_features for layer in layers}
    new = [tensor for key, tensor in live_tensors().items() if key not in before]
    assert sum(tensor is layer.words for tensor in new for layer in layers) == len(layers)  # the search finds things
    copies = [tensor.shape for tensor in new if tensor.is_floating_point() and tensor.numel() in sizes]
    assert copies == []


# ---- generation


@pytest.fixture(scope="module")
def pair(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The packed model, and its float twin."""
    model = checkpoint("llama")
    quantized = quantize(model, tmp_path_factory.mktemp("pair") / "out")
    return llmq.load(quantized)[0], twin(model, quantized)


def generate(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    settings = {"do_sample": False, "attention_mask": torch.ones_like(tokens), **options}
    with torch.inference_mode():
        found: Tensor = model.generate(tokens, min_new_tokens=16, max_new_tokens=16, **settings)
    return found[:, tokens.shape[1] :]


def test_greedy_is_greedy_of_the_float_twin(pair: tuple[Any, Any]) -> None:
    packed, float_twin = pair
    tokens = builders.tokens(2, 6)
    written = generate(packed, tokens)
    assert written.equal(generate(float_twin, tokens))
    assert len(written[0].unique()) > 3  # not one token over and over


def test_the_cache_changes_nothing(pair: tuple[Any, Any]) -> None:
    packed, _ = pair
    tokens = builders.tokens(2, 6)
    assert packed.config.use_cache
    assert generate(packed, tokens).equal(generate(packed, tokens, use_cache=False))


def test_a_padded_batch_writes_what_each_text_alone_would(pair: tuple[Any, Any]) -> None:
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
    """Their logits are those of a half-precision forward.

    Half precision rounds each of some thirty operations on the way to a logit by 2**-11 of numbers around 10, which
    adds up to sqrt(30) * 10 / 2048 = 0.03; the files' own note allows 0.05.  Logits spread by far more.
    """
    expected = load_file(shared / "golden" / name / "expected.safetensors")
    model, tokenizer = llmq.load(shared / "golden" / name, dtype=torch.float32)
    found = logits(model, expected["__input_ids__"])
    theirs = expected["__logits__"].to(torch.float32)
    assert float((found - theirs).abs().max()) <= 0.05
    assert float(theirs.std()) > 0.2
    assert tokenizer("text").input_ids


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_weights_are_dequantized_to_the_bit(shared: Path, name: str) -> None:
    expected = load_file(shared / "golden" / name / "expected.safetensors")
    weights = dict(llmq.dequantize(shared / "golden" / name))
    compared = [key for key in expected if not key.startswith("__")]
    assert len(compared) == 7
    for key in compared:
        assert weights[key].dtype == torch.float32
        assert weights[key].to(expected[key].dtype).equal(expected[key]), key


def move_settings(folder: Path, place: str) -> None:
    """Take the quantization_config out of config.json, to where another writer has it."""
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
def test_settings_that_lie_elsewhere(layout: str, place: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """And what is saved has them in config.json."""
    model, tokens = checkpoint("llama", num_hidden_layers=1), builders.tokens(1, 8)
    if place == "text_config":  # that of the language model inside a model that sees pictures
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
def test_uneven_groups_in_an_order_of_their_own_run_dequantized(
    in_order: bool, packed: int, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Groups of 96 are cut into three of 32 where their columns lie side by side; scattered ones cannot be."""
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


def test_a_shape_that_a_tensor_holds_is_read_once(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_packed_weights_without_a_place_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", num_hidden_layers=2), tmp_path / "out")
    builders.change_json(quantized / "config.json", num_hidden_layers=1)
    with pytest.raises(FormatError, match=r"no linear layer for model\.layers\.1.*7 packed weights in total"):
        llmq.load(quantized)


def test_a_layer_without_weights_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", num_hidden_layers=1), tmp_path / "out")
    builders.change_json(quantized / "config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"needs the tensor model\.layers\.1"):
        llmq.load(quantized)


def test_a_float_model_has_nothing_to_dequantize(checkpoint: Checkpoints) -> None:
    with pytest.raises(FormatError, match="is not quantized"):
        dict(llmq.dequantize(checkpoint("llama")))

"""compressed-tensors with quantized inputs: the tensors, and the block in config.json."""

import dataclasses
from typing import Any

import pytest
import torch

from llmq import formats
from llmq.errors import ConfigError, FormatError
from llmq.formats import compressed_tensors
from llmq.formats.codecs import ct_groups
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import InputScheme, Scheme, WeightScheme

LAYOUT = compressed_tensors.LAYOUT
DYNAMIC, STATIC = InputScheme("int8", "dynamic"), InputScheme("int8", "static", 0.125)
CHANNEL, GROUPED, FP8 = WeightScheme(8, "channel"), WeightScheme(4, 32), WeightScheme.of_floats("fp8")
NVFP4 = WeightScheme.of_floats("nvfp4")
TOKEN_BLOCK = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "group_size": None,
    "actorder": None,
}  # fmt: skip


def weight(scheme: WeightScheme) -> QuantizedTensor:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, scheme.levels + 1, (8, 64), dtype=torch.uint8, generator=draw)
    scales = torch.rand(8, 64 // scheme.columns_per_group(64), generator=draw).to(torch.bfloat16)
    if scheme == NVFP4:
        return QuantizedTensor(codes, torch.ones(scales.shape), None, scheme, global_scale=torch.ones(8, 1))
    return QuantizedTensor(codes, scales, None, scheme)


def test_eight_bits_are_signed_bytes() -> None:
    q = weight(CHANNEL)
    tensors = LAYOUT.pack_layer(q, DYNAMIC)
    assert tensors.keys() == {"weight", "weight_scale"}
    assert tensors["weight"].dtype == torch.int8
    assert torch.equal(tensors["weight"].to(torch.int16) + 128, q.codes.to(torch.int16))


def test_fewer_bits_are_words_as_without_quantized_inputs() -> None:
    q = weight(GROUPED)
    packed, plain = LAYOUT.pack_layer(q, DYNAMIC), LAYOUT.pack(q)
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in plain)


def test_int_quantized_has_bytes_for_any_bits() -> None:
    layout, scheme = formats.load("int-quantized"), Scheme(GROUPED, DYNAMIC)
    q, block = weight(GROUPED), layout.declare({"a": scheme, "b": Scheme(GROUPED)}, [])
    tensors, reading = layout.pack_layer(q, DYNAMIC), compressed_tensors.LAYOUT.read_config(block)("a")
    assert (int(tensors["weight"].min()), int(tensors["weight"].max())) == (-8, 7)
    assert reading is not None and torch.equal(LAYOUT.unpack(tensors, reading).codes, q.codes)
    assert [g["format"] for g in block["config_groups"].values()] == ["int-quantized", "pack-quantized"]


def test_a_static_scale_is_a_tensor() -> None:
    scale = LAYOUT.pack_layer(weight(CHANNEL), STATIC)["input_scale"]
    assert (scale.dtype, scale.tolist()) == (torch.bfloat16, [0.125])


def test_the_configuration_of_one_scheme() -> None:
    block = LAYOUT.declare({"a.q": Scheme(CHANNEL, DYNAMIC), "a.k": Scheme(CHANNEL, DYNAMIC)}, ["lm_head"])
    [group] = block["config_groups"].values()
    assert (block["format"], group["format"], group["targets"]) == ("int-quantized", "int-quantized", ["Linear"])
    assert group["input_activations"] == TOKEN_BLOCK
    assert group["weights"]["strategy"] == "channel"


def test_layers_that_differ_have_separate_groups() -> None:
    schemes = {"a.q": Scheme(CHANNEL, DYNAMIC), "a.down": Scheme(CHANNEL), "a.up": Scheme(GROUPED, STATIC)}
    block = LAYOUT.declare(schemes, [])
    groups = {group["targets"][0]: group for group in block["config_groups"].values()}
    assert block["format"] == "mixed-precision"
    assert [groups[name]["format"] for name in schemes] == ["int-quantized", "pack-quantized", "pack-quantized"]
    assert groups["a.down"]["input_activations"] is None
    assert groups["a.up"]["input_activations"] == {**TOKEN_BLOCK, "strategy": "tensor", "dynamic": False}


def test_static_scales_do_not_separate_layers() -> None:
    other = dataclasses.replace(STATIC, scale=0.5)
    assert len(LAYOUT.declare({"a": Scheme(CHANNEL, STATIC), "b": Scheme(CHANNEL, other)}, [])["config_groups"]) == 1


def test_without_quantized_inputs_groups_have_no_format() -> None:
    block = LAYOUT.declare({"a": Scheme(GROUPED)}, [])
    assert block == LAYOUT.quantization_config({"a": GROUPED}, [])
    assert "format" not in block["config_groups"]["group_0"]


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(CHANNEL, DYNAMIC),
        Scheme(GROUPED, DYNAMIC),
        Scheme(CHANNEL, STATIC),
        Scheme(FP8, InputScheme("fp8", "dynamic")),
        Scheme(FP8, InputScheme("fp8", "static", 0.125)),
        Scheme(GROUPED, InputScheme("fp8", "dynamic")),
        Scheme(NVFP4, InputScheme("nvfp4", "local", 384.0)),
    ],
    ids=str,
)
def test_what_is_written_is_read(scheme: Scheme) -> None:
    assert scheme.weights is not None and scheme.inputs is not None
    q = weight(scheme.weights)
    reading = LAYOUT.read_config(LAYOUT.declare({"a": scheme}, []))("a")
    assert reading is not None and reading.inputs == scheme.inputs.declared and not reading.note
    tensors = LAYOUT.pack_layer(q, scheme.inputs)
    assert set(LAYOUT.needs(reading)) <= tensors.keys()
    back = LAYOUT.unpack(tensors, reading)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales) and back.scheme == q.scheme
    assert LAYOUT.pack_like is not None and LAYOUT.with_inputs is not None
    again = LAYOUT.pack_like(q, dataclasses.replace(reading, inputs=scheme.inputs))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    if scheme.inputs.scale is not None:
        assert LAYOUT.with_inputs.scale(tensors) == scheme.inputs.scale


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 4},
        {"symmetric": False},
        {"strategy": "tensor"},
        {"dynamic": "local"},
        ct_groups.inputs_block(InputScheme("nvfp4", "local")),
    ],
    ids=str,
)
def test_other_quantized_inputs_are_noted(change: dict[str, Any]) -> None:
    block = LAYOUT.declare({"a": Scheme(CHANNEL, DYNAMIC)}, [])
    block["config_groups"]["group_0"]["input_activations"] |= change
    reading = LAYOUT.read_config(block)("a")
    assert reading is not None and (reading.inputs, reading.note) == (None, "quantized activations")


@pytest.mark.parametrize("stored", [None, torch.zeros(2), torch.zeros(1, dtype=torch.int32)], ids=str)
def test_a_damaged_static_scale_is_an_error(stored: torch.Tensor | None) -> None:
    assert LAYOUT.with_inputs is not None
    with pytest.raises(FormatError, match="input_scale"):
        LAYOUT.with_inputs.scale({} if stored is None else {"input_scale": stored})


def test_inputs_in_nvfp4_are_declared_as_compressed_tensors_does() -> None:
    scheme = Scheme(NVFP4, InputScheme("nvfp4", "local", 384.0))
    block = LAYOUT.declare({"a": scheme, "b": Scheme(NVFP4, InputScheme("nvfp4", "local", 2.0))}, [])
    [group] = block["config_groups"].values()
    assert (block["format"], group["format"]) == ("nvfp4-pack-quantized", "nvfp4-pack-quantized")
    assert group["input_activations"] == {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
        "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    tensors = LAYOUT.pack_layer(weight(NVFP4), scheme.inputs)
    assert tensors["input_global_scale"].dtype == torch.float32 and tensors["input_global_scale"].tolist() == [384.0]


def test_inputs_in_fp8_are_declared_as_floats() -> None:
    block = LAYOUT.declare({"a": Scheme(FP8, InputScheme("fp8", "dynamic"))}, [])
    [group] = block["config_groups"].values()
    assert (block["format"], group["format"]) == ("float-quantized", "float-quantized")
    assert group["input_activations"] == {**TOKEN_BLOCK, "type": "float"}
    words = LAYOUT.declare({"a": Scheme(WeightScheme(4), InputScheme("fp8", "dynamic"))}, [])
    assert words["format"] == words["config_groups"]["group_0"]["format"] == "pack-quantized"


@pytest.mark.parametrize(
    ("weights", "inputs", "words"),
    [
        (WeightScheme(4, 32, False), DYNAMIC, "zero points"),
        (WeightScheme(8, 128), DYNAMIC, "use --group-size channel"),
        (FP8, DYNAMIC, "no engine multiplies int8 inputs by fp8"),
        (NVFP4, InputScheme("fp8"), "no engine multiplies inputs in fp8 by weights in nvfp4"),
        (FP8, InputScheme("nvfp4", "local"), "use nvfp4 for both, or for none"),
        (CHANNEL, InputScheme("fp8"), "not int8 channel"),
        (GROUPED, InputScheme("fp8"), "with --group-size 128"),
        (WeightScheme(4), InputScheme("fp8", "static"), "dynamic scales only"),
    ],
    ids=str,
)
def test_products_without_a_kernel_are_refused(weights: WeightScheme, inputs: InputScheme, words: str) -> None:
    assert LAYOUT.with_inputs is not None
    assert words in str(LAYOUT.with_inputs.refusal(Scheme(weights, inputs)))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(CHANNEL, DYNAMIC),
        Scheme(WeightScheme(4), InputScheme("fp8")),
        Scheme(FP8, InputScheme("fp8", "static")),
        Scheme(NVFP4, InputScheme("nvfp4", "local")),
    ],
    ids=str,
)
def test_products_with_a_kernel_are_not_refused(scheme: Scheme) -> None:
    assert LAYOUT.with_inputs is not None and LAYOUT.with_inputs.refusal(scheme) is None


@pytest.mark.parametrize("name", sorted(set(formats.names()) - {"compressed-tensors", "int-quantized"}))
def test_other_formats_have_no_place_for_quantized_inputs(name: str) -> None:
    with pytest.raises(ConfigError, match="no place for quantized inputs"):
        formats.load(name).declare({"a": Scheme(GROUPED, DYNAMIC)}, [])


def test_static_inputs_without_a_scale_are_not_written() -> None:
    assert LAYOUT.with_inputs is not None
    with pytest.raises(FormatError, match="int8 static per tensor have no scale"):
        LAYOUT.with_inputs.pack(weight(CHANNEL), InputScheme("int8", "static"))

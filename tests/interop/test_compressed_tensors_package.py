"""The compressed-tensors package reads the words that llmq writes, and accepts its configuration."""

from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")

from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import (  # type: ignore[import-untyped]
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # type: ignore[import-untyped]
from compressed_tensors.quantization.utils import (  # type: ignore[import-untyped]
    compute_dynamic_scales_and_zp,
    generate_gparam,
)

from llmq.formats import compressed_tensors
from llmq.numerics import affine_grid
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, InputScheme, Scheme, WeightScheme

pytestmark = pytest.mark.interop


def example(scheme: WeightScheme, N: int = 24, K: int = 96) -> QuantizedTensor:
    draw = torch.Generator().manual_seed(0)
    G = K // scheme.columns_per_group(K)
    codes = torch.randint(0, scheme.levels + 1, (N, K), dtype=torch.uint8, generator=draw)
    zeros = torch.randint(0, scheme.levels + 1, (N, G), dtype=torch.int16, generator=draw)
    scales = torch.randn(N, G, generator=draw).to(torch.float16)
    return QuantizedTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_read(bits: int) -> None:
    q = example(WeightScheme(bits, 32))
    words = compressed_tensors.pack(q)["weight_packed"]
    signed = unpack_from_int32(words, bits, torch.Size(q.shape))
    assert torch.equal(signed.to(torch.int16) + q.scheme.middle, q.codes.to(torch.int16))


@pytest.mark.parametrize("bits", BITS)
def test_zeros_are_read(bits: int) -> None:
    q = example(WeightScheme(bits, 32, symmetric=False))
    assert q.zeros is not None
    words = compressed_tensors.pack(q)["weight_zero_point"]
    signed = unpack_from_int32(words, bits, q.zeros.shape, packed_dim=0)
    assert torch.equal(signed.to(torch.int16) + q.scheme.middle, q.zeros)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("K", [7, 32, 50, 96])
def test_words_are_the_same(bits: int, K: int) -> None:
    q = example(WeightScheme(bits, "channel"), K=K)
    signed = (q.codes.to(torch.int16) - q.scheme.middle).to(torch.int8)
    assert torch.equal(compressed_tensors.pack(q)["weight_packed"], pack_to_int32(signed, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_decompressed_to_the_bit(bits: int, group_size: int, symmetric: bool) -> None:
    # float16 times an integer below 2**8 is exact in float32, so both sides round once, to the same number.
    q = example(WeightScheme(bits, group_size, symmetric))
    declared = QuantizationConfig.model_validate(compressed_tensors.quantization_config({"a": q.scheme}, []))
    (group,) = declared.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(declared.format)
    weight = compressor.decompress(compressed_tensors.pack(q), group)["weight"]
    assert torch.equal(weight, q.dequantize().to(torch.float16))


def test_the_configuration_is_valid() -> None:
    block = compressed_tensors.quantization_config(
        {"a.q": WeightScheme(4, 128), "a.k": WeightScheme(4, 128)}, ["lm_head"]
    )
    declared = QuantizationConfig.model_validate(block)
    (group,) = declared.config_groups.values()
    assert declared.quantization_status == QuantizationStatus.COMPRESSED
    assert (group.targets, declared.ignore) == (["Linear"], ["lm_head"])
    assert (group.weights.num_bits, group.weights.group_size, group.weights.symmetric) == (4, 128, True)


def test_a_configuration_of_several_grids_is_valid() -> None:
    schemes = {
        "a.q": WeightScheme(4, 128),
        "a.k": WeightScheme(3, "channel", symmetric=False),
        "a.v": WeightScheme(4, "tensor"),
    }
    declared = QuantizationConfig.model_validate(compressed_tensors.quantization_config(schemes, ["lm_head"]))
    arguments = {target: group.weights for group in declared.config_groups.values() for target in group.targets}
    assert {name: (w.num_bits, w.strategy, w.symmetric) for name, w in arguments.items()} == {
        "a.q": (4, "group", True), "a.k": (3, "channel", False), "a.v": (4, "channel", True),
    }  # fmt: skip


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "int"), ("fp8", "float")])
def test_inputs_are_rounded_as_the_package_rounds_them(dtype: Any, kind: Any) -> None:
    arguments = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 96, generator=draw) * 10 ** torch.randn(3, 40, 1, generator=draw)
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(96, 8))
    rounding = rounding_for(InputScheme(dtype, "dynamic"))
    assert torch.equal(rounding(x), fake_quantize(x, scale, zero, arguments))


def test_inputs_in_nvfp4_are_rounded_as_the_package_rounds_them() -> None:
    scheme = Scheme(WeightScheme.of_floats("nvfp4"), InputScheme("nvfp4", "local"))
    declared = QuantizationConfig.model_validate(compressed_tensors.LAYOUT.declare({"a": scheme}, []))
    (group,) = declared.config_groups.values()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 96, generator=draw) * 10 ** torch.randn(3, 40, 1, generator=draw)
    x[0, 0, :16], x[0, 1] = 0, 1e-6
    x[2, :20] = torch.randint(-24, 25, (20, 96), generator=draw) / 4
    x[2, :20, ::16] = 6.0  # with the second global scale the scale is 1: values halfway between two others
    for shared in (generate_gparam(x[:2].min(), x[:2].max()), torch.tensor([448.0])):
        scale, zero = compute_dynamic_scales_and_zp(x, group.input_activations, torch.nn.Linear(96, 8), shared)
        theirs = fake_quantize(x, scale, zero, group.input_activations, global_scale=shared)
        ours = rounding_for(InputScheme("nvfp4", "local", float(shared)))(x)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8", "fp8-block"])
def test_floats_are_decompressed_to_the_bit(name: str) -> None:
    scheme, draw = WeightScheme.of_floats(name), torch.Generator().manual_seed(0)
    shape = (256, 384) if name == "fp8-block" else (24, 96)
    grid = affine_grid.fit_searched(torch.randn(shape, generator=draw), scheme, torch.bfloat16)
    q = grid.quantized(torch.randint(0, scheme.levels + 1, shape, dtype=torch.uint8, generator=draw))
    declared = QuantizationConfig.model_validate(compressed_tensors.quantization_config({"a": scheme}, []))
    (group,) = declared.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(declared.format)
    weight = compressor.decompress(compressed_tensors.pack(q), group)["weight"]
    assert torch.equal(weight.float(), q.dequantize().to(weight.dtype).float())

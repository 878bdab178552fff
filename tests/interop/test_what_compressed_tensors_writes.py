"""llmq reads tensors compressed by the compressed-tensors package exactly as the package reads them."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")

from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
from compressed_tensors.quantization import (  # type: ignore[import-untyped]
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from llmq import formats

pytestmark = pytest.mark.interop


def written(
    packing: str, tensors: dict[str, Tensor], **weights: Any
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The tensors that the package stores for a weight, the decompressed weight, and the entry for config.json."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=packing)
    compressor = BaseCompressor.get_value_from_registry(packing)
    stored = compressor.compress(tensors, scheme)
    weight = compressor.decompress(dict(stored), scheme)["weight"]
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=packing, quantization_status=QuantizationStatus.COMPRESSED
    )
    return stored, weight, config.model_dump(mode="json")


def read(stored: dict[str, Tensor], block: dict[str, Any]) -> Tensor:
    layout = formats.detect({"quant_method": "compressed-tensors", **block})
    reading = layout.read_config(block)("model.layers.0.mlp.down_proj")
    assert reading is not None
    tensors = {name: tensor.detach() for name, tensor in stored.items()}
    return layout.unpack(tensors, reading).dequantize() if reading.decode is None else reading.decode(tensors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packed_integers_are_read_exactly(bits: int, group: int | None, symmetric: bool) -> None:
    draw = torch.Generator().manual_seed(bits)
    N, K = 21, 96
    G, half = K // (group or K), 1 << (bits - 1)
    tensors = {
        "weight": torch.randn(N, K, generator=draw).to(torch.bfloat16),
        "weight_scale": (torch.rand(N, G, generator=draw) * 4 / half + 0.01).to(torch.bfloat16),
        "weight_zero_point": torch.randint(-half, half, (N, G), generator=draw).to(torch.int8),
    }
    if symmetric:
        tensors["weight_zero_point"] = torch.zeros(N, G, dtype=torch.int8)
    strategy = "channel" if group is None else "group"
    stored, expected, block = written(
        "pack-quantized", tensors, num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric
    )
    assert torch.equal(read(stored, block).to(expected.dtype), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("packing", ["int-quantized", "naive-quantized"])
def test_one_byte_per_code_is_read_exactly(packing: str, symmetric: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(6, 40, generator=draw),
        "weight_scale": torch.rand(6, 1, generator=draw) / 40 + 0.001,
        "weight_zero_point": torch.randint(-9, 9, (6, 1), generator=draw).to(torch.int8) * (not symmetric),
    }
    stored, expected, block = written(packing, tensors, num_bits=8, strategy="channel", symmetric=symmetric)
    assert torch.equal(read(stored, block).to(expected.dtype), expected)


@pytest.mark.parametrize(("packing", "group"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_four_bit_floats_are_read_exactly(packing: str, group: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 128, generator=draw).to(torch.bfloat16)
    largest = weight.to(torch.float32).unflatten(1, (-1, group)).abs().amax(-1)
    tensors = {"weight": weight}
    if group == 16:
        whole = torch.tensor([448 * 6 / float(largest.max())])
        scale = (largest / 6 * whole).to(torch.float8_e4m3fn).to(torch.float32)
        tensors |= {"weight_scale": scale, "weight_global_scale": whole}
    else:
        tensors["weight_scale"] = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    strategy = "tensor_group" if group == 16 else "group"
    stored, expected, block = written(
        packing, tensors, num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True
    )
    decoded = read(stored, block)
    assert torch.equal(decoded.to(expected.dtype), expected)
    assert (decoded - weight.to(torch.float32)).abs().max() < 1  # and the decoded weight is near the original

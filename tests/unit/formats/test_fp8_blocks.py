"""Blocks of fp8: one scale per 128 x 128 weights, repeated for each row in memory and stored once."""

import dataclasses

import pytest
import torch

from llmq.algorithms import Options, refit
from llmq.errors import FormatError
from llmq.formats import compressed_tensors
from llmq.formats.base import Reading
from llmq.numerics import affine_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

BLOCKS = WeightScheme.of_floats("fp8-block")


def weight(rows: int = 256, columns: int = 384) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantized(values: torch.Tensor) -> QuantizedTensor:
    grid = affine_grid.fit_searched(values, BLOCKS, torch.float32)
    return grid.quantized(grid.encode(values))


def reading() -> Reading:
    declared = compressed_tensors.read_config(compressed_tensors.quantization_config({"a": BLOCKS}, []))("a")
    assert declared is not None
    return declared


def test_the_scale_of_a_block_fits_its_largest_weight() -> None:
    values = weight()
    q = quantized(values)
    for row, column in ((0, 0), (128, 256)):
        block = values[row : row + 128, column : column + 128]
        assert torch.all(q.scales[row : row + 128, column // 128] == block.abs().amax() / 448)


def test_the_file_has_one_scale_per_block() -> None:
    q = quantized(weight())
    tensors = compressed_tensors.pack(q)
    assert tensors["weight_scale"].shape == (2, 3)
    back = compressed_tensors.unpack(tensors, reading())
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    decode = reading().decode
    assert decode is not None and torch.equal(decode(tensors), q.dequantize())


def test_rows_of_a_block_with_different_scales_are_refused() -> None:
    q = quantized(weight())
    scales = q.scales.clone()
    scales[5] *= 2
    with pytest.raises(FormatError, match="expected one scale per block"):
        compressed_tensors.pack(dataclasses.replace(q, scales=scales))


def test_scales_of_blocks_are_not_refitted() -> None:
    values = weight()
    q = quantized(values)
    refitted = refit.refine(values, q, torch.eye(384), Options(torch.float32, "activation", "searched", 0.01))
    assert torch.equal(refitted.scales, q.scales)


def test_parts_of_blocks_are_read_by_rows_and_refused_by_columns() -> None:
    tensors = compressed_tensors.pack(quantized(weight()))
    cut = {**tensors, "weight": tensors["weight"][:200]}
    assert torch.equal(compressed_tensors.unpack(cut, reading()).dequantize(), quantized(weight()).dequantize()[:200])
    for columns in (200, 0):
        with pytest.raises(FormatError, match=f"has {columns} columns, expected whole groups"):
            compressed_tensors.unpack({**tensors, "weight": tensors["weight"][:, :columns]}, reading())
    assert "128 rows do not divide 200 rows" in (compressed_tensors.refusal(BLOCKS, 200, 384) or "")


def test_blocks_of_another_size_are_refused() -> None:
    config = compressed_tensors.quantization_config({"a": BLOCKS}, [])
    config["config_groups"]["group_0"]["weights"]["block_structure"] = [64, 128]
    with pytest.raises(FormatError, match="block_structure"):
        compressed_tensors.read_config(config)("a")

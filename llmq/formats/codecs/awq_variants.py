"""The forms of AWQ that were each made for one kernel, read only: four bits, packed along K.

gemv: a word holds eight inputs of an output, lowest first; scales and zero points are padded to whole words.

    qweight  int32 (N, K / 8)
    qzeros   int32 (N, W)        zero points along G, eight per word; W >= G / 8
    scales   float (N, 8 W)

gemv_fast and llm-awq: a word of 16 bits holds four inputs of an output, after three changes of order.  Of every 32
inputs, pairs are taken from the four eights in turn (0 1, 8 9, 16 17, 24 25, 2 3, …).  Of every eight of those, the
even ones come before the odd ones.  The words of 64 inputs are followed by those of the same inputs of the next three
outputs.

    qweight  int16 (N / 4, K)
    scales   float (8 W, N)
    qzeros   float (8 W, N)      -scale * zero, rounded; llm-awq calls it scaled_zeros

In these two forms the zero point is the nearest integer to -qzeros / scales.

Source: github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemv.py and gemv_fast.py; github.com/mit-han-lab/llm-awq,
awq/quantize/qmodule.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Reading
from llmq.formats.codecs import bit_packing, checks
from llmq.numerics.quantized_tensor import QuantizedTensor

GEMV, GEMV_FAST, LLM_AWQ = "gemv", "gemv_fast", "llm_awq"
BITS, LEVELS = 4, 15
ROWS, STRIDE = 4, 64  # outputs that share a row of words, consecutive inputs of an output in it
FAR_FROM_WHOLE = 0.2  # rounding -s * z to 11 bits changes z <= 15 by less than 0.01


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    words = torch.int32 if reading.packing == GEMV else torch.int16
    qweight = checks.stored(tensors, "qweight", (words,), (None, None))
    N, K = weight_shape(tuple(qweight.shape), reading)
    G = checks.groups_of(reading, K)
    if reading.packing == GEMV:
        scales = _first(checks.stored(tensors, "scales", checks.SCALE_DTYPES, (N, None)), "scales", G)
        qzeros = checks.stored(tensors, "qzeros", (torch.int32,), (N, None))
        zeros = _first(bit_packing.unpack(qzeros, BITS, qzeros.shape[1] * 8), "qzeros", G)
        return checks.affine(bit_packing.unpack(qweight, BITS, K), scales, zeros.to(torch.int16), reading)
    if N % ROWS or K % STRIDE:
        raise FormatError(f"a weight ({N}, {K}) cannot be in the form {reading.packing}")
    name = "scaled_zeros" if "scaled_zeros" in tensors else "qzeros"
    scales, scaled = (
        _first(checks.stored(tensors, suffix, checks.SCALE_DTYPES, (None, N)).T, suffix, G)
        for suffix in ("scales", name)
    )
    return checks.affine(_deinterleaved(qweight), scales, _whole_zeros(scales, scaled), reading)


def weight_shape(qweight: tuple[int, ...], reading: Reading) -> tuple[int, int]:
    """(N, K), from the shape of qweight."""
    rows, columns = qweight
    return (rows, columns * 8) if reading.packing == GEMV else (rows * ROWS, columns)


def _deinterleaved(words: Tensor) -> Tensor:
    """int16 (N / 4, K) -> uint8 (N, K)"""
    quarter, K = words.shape
    nibbles = torch.stack([((words >> shift) & LEVELS).to(torch.uint8) for shift in (0, 4, 8, 12)], dim=-1)
    side_by_side = nibbles.reshape(quarter, K // STRIDE, ROWS, STRIDE)  # four rows, 64 inputs each
    rows = side_by_side.transpose(1, 2).reshape(quarter * ROWS, K)
    in_order = rows.reshape(-1, K // 8, 2, 4).transpose(2, 3)  # (N, K / 8, 4, 2): even and odd in pairs again
    pairs = in_order.reshape(-1, K // 32, 4, 4, 2)  # (N, K / 32, pair, eight, 2)
    return pairs.transpose(2, 3).reshape(-1, K).contiguous()


def _whole_zeros(scales: Tensor, scaled: Tensor) -> Tensor:
    """(N, G) each -> int16 (N, G)"""
    quotient = torch.where(scales == 0, 0.0, -scaled.to(torch.float32) / scales.to(torch.float32))
    zeros = quotient.round()
    if bool(((quotient - zeros).abs() > FAR_FROM_WHOLE).any()) or bool(((zeros < 0) | (zeros > LEVELS)).any()):
        raise FormatError("the zero points, qzeros divided by scales, are not integers from 0 to 15")
    return zeros.to(torch.int16)


def _first(padded: Tensor, name: str, G: int) -> Tensor:
    """(N, at least G) -> (N, G)"""
    if padded.shape[1] < G:
        raise FormatError(f"{name} has {padded.shape[1]} groups, expected {G}")
    return padded[:, :G]

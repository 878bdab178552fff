"""Weights in K-quants: decoded by ggml, and closer to the original than after quantization by ggml.

Source of the functions: github.com/ggml-org/llama.cpp, ggml/include/ggml.h, called through the wheel xllamacpp.
"""

import ctypes
import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, gptq, output_error
from llmq.formats import gguf as layout
from llmq.numerics import affine_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

pytestmark = pytest.mark.interop
TYPES = {
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "q5_0": 6,
    "q8_0": 8,
    "iq4_nl": 20,
    "iq4_xs": 23,
}  # enum ggml_type
TWO_LEVEL = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
FLOATS = ctypes.POINTER(ctypes.c_float)
SIZE = ctypes.c_int64
N, K = 64, 512


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(spec.origin)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, FLOATS, ctypes.c_void_p, SIZE, SIZE, SIZE, FLOATS]
    return library


def decoded(ggml: ctypes.CDLL, kind: str, raw: np.ndarray, columns: int) -> Tensor:
    """(N, K) float32, decoded by ggml from rows of bytes."""
    weight = torch.empty(len(raw), columns)
    unpack = getattr(ggml, f"dequantize_row_{kind.replace('_k', '_K')}")
    unpack.argtypes, unpack.restype = [ctypes.c_void_p, FLOATS, SIZE], None
    unpack(np.ascontiguousarray(raw).ctypes.data, ctypes.cast(weight.data_ptr(), FLOATS), weight.numel())
    return weight


def rounded_by_ggml(ggml: ctypes.CDLL, kind: str, weight: Tensor, importance: Tensor | None) -> Tensor:
    """A weight (N, K) quantized by ggml and decoded, with an importance matrix (K,) or without."""
    room = np.empty((len(weight), 4 * weight.shape[1]), dtype=np.uint8)
    matrix = None if importance is None else ctypes.cast(importance.data_ptr(), FLOATS)
    source = ctypes.cast(weight.data_ptr(), FLOATS)
    size = ggml.ggml_quantize_chunk(TYPES[kind], source, room.ctypes.data, 0, *weight.shape, matrix)
    return decoded(ggml, kind, room.reshape(-1)[:size].reshape(len(weight), -1), weight.shape[1])


def nearest(weight: Tensor, kind: str, importance: Tensor | None = None) -> QuantizedTensor:
    chosen = affine_grid.fit_searched(weight, WeightScheme.of_blocks(kind), torch.float16, importance)
    return chosen.quantized(chosen.encode(weight))


def weight_of(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=draw) * torch.rand(N, 1, generator=draw).add(0.1)


@pytest.mark.parametrize("kind", TYPES)
def test_ggml_decodes_the_same_weight(ggml: ctypes.CDLL, kind: str) -> None:
    q = nearest(weight_of(0) * torch.logspace(-4, 2, N)[:, None], kind)
    assert torch.equal(decoded(ggml, kind, layout.pack_blocks(q), K), q.dequantize())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("kind", "gain"),
    [("q2_k", 0.93), ("q3_k", 0.98), ("q4_k", 0.97), ("q5_k", 0.93), ("q6_k", 0.95), ("iq4_nl", 1), ("iq4_xs", 1)],
)
def test_searched_scales_have_a_lower_error_than_ggml(
    ggml: ctypes.CDLL, kind: str, gain: float, weighted: bool
) -> None:
    weight, importance = weight_of(1), torch.rand(K, generator=torch.Generator().manual_seed(2)).square() + 0.05
    given = importance if weighted else None
    squares = [
        (decoded_weight - weight).square().mul(importance if weighted else 1.0).sum()
        for decoded_weight in (nearest(weight, kind, given).dequantize(), rounded_by_ggml(ggml, kind, weight, given))
    ]
    assert float(squares[0] / squares[1]) < gain


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_gptq_error_is_below_ggml_with_an_importance_matrix(ggml: ctypes.CDLL, kind: str) -> None:
    draw = torch.Generator().manual_seed(3)
    mixing = torch.randn(K, K, generator=draw) / K**0.5 + torch.eye(K)
    stats = InputStats(K, torch.device("cpu"))
    stats.update(torch.randn(2048, K, generator=draw) @ mixing)
    weight = weight_of(4)
    ours = gptq.round_weight(weight, stats, WeightScheme.of_blocks(kind), Options(torch.float16)).quantized.dequantize()
    theirs = rounded_by_ggml(ggml, kind, weight, stats.mean_square.contiguous())
    losses = [
        float(output_error(weight, decoded_weight, stats.second_moment()).sum()) for decoded_weight in (ours, theirs)
    ]
    assert losses[0] < 0.8 * losses[1]

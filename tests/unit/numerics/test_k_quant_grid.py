"""Two-level grids, compared with an exhaustive search and with the decoded bytes of the file."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from llmq.errors import ConfigError
from llmq.formats import gguf as layout
from llmq.formats.base import Reading
from llmq.formats.codecs import gguf_blocks
from llmq.numerics import affine_grid, k_quant_grid
from llmq.numerics.gguf_types import BLOCK_TYPES
from llmq.numerics.quantized_tensor import QuantizedTensor, where
from llmq.numerics.scheme import WeightScheme
from llmq_kernels.value_tables import IQ4

INTEGERS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
TWO_LEVEL = (*INTEGERS, "iq4_xs", "iq4_nl")
Array = NDArray[Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, kind: str, importance: Tensor | None = None) -> QuantizedTensor:
    chosen = affine_grid.fit_searched(weight, WeightScheme.of_blocks(kind), torch.float16, importance)
    return chosen.quantized(chosen.encode(weight))


def errors(weight: Tensor, q: QuantizedTensor, importance: Tensor | None = None) -> Tensor:
    """(N,) float64"""
    squares = (q.dequantize().double() - weight.double()).square()
    return (squares if importance is None else squares * importance).sum(1)


# ---- the fit


def half(value: float) -> float:
    return float(np.float16(value))


def exhaustive(x: Array, cost: Array, levels: int, steps: int) -> float:
    """The least error of a superblock (8, 32) over all sc and m, and steps x steps pairs of d and dmin."""
    widest, offset = (x.max(1).clip(0) - x.min(1).clip(None, 0)).max() / levels, -x.min()
    best = np.inf
    s, m = (part.ravel().astype(float) for part in np.meshgrid(np.arange(1, 64), np.arange(64)))
    for first, second in itertools.product(np.linspace(0.65, 1.0, steps), repeat=2):
        d, dmin = half(first * widest / 63), half(second * offset / 63)
        scale, minimum = (d * s)[:, None, None], (dmin * m)[:, None, None]
        q = np.clip(np.round((x + minimum) / scale), 0, levels)
        total = (cost * (q * scale - minimum - x) ** 2).sum(2).min(0).sum()
        best = min(best, total)
    return float(best)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_close_to_an_exhaustive_search(weighted: bool) -> None:
    weight = random(2, 256, seed=1)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else None
    cost = np.ones((8, 32)) if importance is None else importance.double().numpy().reshape(8, 32)
    fitted_errors = errors(weight, rounded(weight, "q4_k", importance), importance)
    for row, error in zip(weight, fitted_errors, strict=True):
        assert float(error) <= 1.03 * exhaustive(row.double().numpy().reshape(8, 32), cost, levels=15, steps=3)


def test_least_squares_recovers_d_and_dmin_of_a_grid() -> None:
    draw = torch.Generator().manual_seed(12)
    sc, m = (torch.randint(30, 64, (4, 8), generator=draw).float() for _ in range(2))
    q = torch.randint(0, 16, (4, 8, 32), generator=draw)
    d, dmin = (torch.full((4,), value).half().float() for value in (0.01, 0.05))
    x = (d[:, None] * sc)[..., None] * q - (dmin[:, None] * m)[..., None]
    near = (1.002 * d).half().float(), (0.999 * dmin).half().float()  # close enough for the same codes
    fitted = k_quant_grid._shared_by_least_squares(x, torch.ones_like(x), near[0], sc, near[1], m, 15)
    assert not torch.equal(near[0], d) and not torch.equal(near[1], dmin)
    assert torch.equal(fitted[0], d) and torch.equal(fitted[1], dmin)


def by_ranges(weight: Tensor, kind: str) -> Tensor:
    """(N, K) float64: rounded to nearest with the min-max range of each sub-block, stored in 6-bit numbers."""
    scheme = BLOCK_TYPES[kind]
    x = weight.double().reshape(len(weight), -1, 256 // scheme.group, scheme.group)  # (N, S, B, g)
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        s, o = x.abs().amax(3) / (levels // 2), None
        d = s.amax(2, keepdim=True).half().double() / 127
        s = d * (s / d).round()
        codes = (x / s[..., None]).round().clamp(-(levels // 2) - 1, levels // 2)
        return torch.reshape(codes * s[..., None], weight.shape)
    o = -x.amin(3).clamp(max=0)
    s = (x.amax(3).clamp(min=0) + o) / levels
    d, dmin = (part.amax(2, keepdim=True).div(63).half().double() for part in (s, o))
    s, o = d * (s / d).round().clamp(1, 63), dmin * (o / dmin).round()
    q = ((x + o[..., None]) / s[..., None]).round().clamp(0, levels)
    return torch.reshape(q * s[..., None] - o[..., None], weight.shape)


@pytest.mark.parametrize("kind", INTEGERS)
def test_no_row_is_worse_than_with_min_max_ranges(kind: str) -> None:
    weight = random(24, 512, seed=3) * torch.logspace(-3, 1, 24)[:, None]
    weight[::4, ::37] *= 8
    naive = (by_ranges(weight, kind) - weight.double()).square().sum(1)
    fitted = errors(weight, rounded(weight, kind))
    assert (fitted < naive).all()
    assert float((fitted / naive).mean()) < 0.9


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_importance_shifts_errors_to_other_columns(kind: str) -> None:
    weight, importance = random(16, 256, seed=4), torch.rand(256, generator=torch.Generator().manual_seed(5)) ** 4
    weighed, plain = rounded(weight, kind, importance), rounded(weight, kind)
    assert float(errors(weight, weighed, importance).sum()) < 0.95 * float(errors(weight, plain, importance).sum())
    assert float(errors(weight, weighed).sum()) > float(errors(weight, plain).sum())


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_rows_are_fitted_independently(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(4, 512, seed=6)
    whole = rounded(weight, kind).dequantize()
    monkeypatch.setattr(k_quant_grid, "ELEMENTS_AT_ONCE", {"cpu": 1536})
    assert torch.equal(rounded(weight, kind).dequantize(), whole)
    assert torch.equal(rounded(weight[3:4], kind).dequantize(), whole[3:4])


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_extremes_stay_finite_and_close(kind: str) -> None:
    weight = random(8, 256, seed=7)
    weight[0] = 0
    weight[1] = 3.5
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    weight[4] *= 1e-6
    weight[5, 100] = 1e4
    weight[6, :128] = 0
    weight[7] *= 1e4
    q = rounded(weight, kind)
    decoded = q.dequantize()
    assert q.superblocks is not None and bool((q.superblocks.sc != 0).all())
    assert bool(decoded.isfinite().all())
    assert float(decoded[0].abs().max()) <= (0 if q.scheme.table is None else 2.0**-24)  # no value of IQ4 is zero
    for row in (1, 2, 3, 7):
        allowed = {2: 0.35, 3: 0.2}.get(q.scheme.bits, 0.1)
        assert float((decoded[row] - weight[row]).norm()) < allowed * float(weight[row].norm())
    # Its range of 6e-6 in 15 steps is 4e-7 per step, a multiple of d, which is the smallest fp16 number, 6e-8.
    assert float((decoded[4] - weight[4]).abs().max()) <= 4e-7 * max(1, 15 / q.scheme.levels)


# ---- the tensor and its bytes


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_tensor_equals_its_decoded_bytes(kind: str) -> None:
    weight = random(6, 512, seed=8) * torch.tensor([1e-4, 1e-2, 1.0, 3.0, 0.0, 100.0])[:, None]
    q = rounded(weight, kind)
    raw = layout.pack_blocks(q)
    assert raw.shape == (6, 512 // BLOCK_TYPES[kind].columns * BLOCK_TYPES[kind].nbytes)
    np.testing.assert_array_equal(gguf_blocks.decode(kind.upper(), raw), q.dequantize().numpy())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_unpacked_bytes_are_packed_to_the_same_bytes(kind: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    raw = draw.integers(0, 256, (3, 2 * BLOCK_TYPES[kind].nbytes * (256 // BLOCK_TYPES[kind].columns)), dtype=np.uint8)
    suffix = f"{layout.PREFIX}{kind}"
    reading = Reading(WeightScheme.of_blocks(kind))
    unpacked = layout.unpack({suffix: torch.from_numpy(raw)}, reading)
    assert unpacked.shape == (3, 512) == layout.weight_shape({suffix: raw.shape}, reading, lambda _: torch.empty(0))
    assert torch.equal(layout.pack(unpacked)[suffix], torch.from_numpy(raw))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_scales_and_zeros_describe_the_weight(kind: str) -> None:
    q = rounded(random(4, 256, seed=9), kind)
    groups = q.column_groups()
    zeros = torch.tensor(q.scheme.middle) if q.zeros is None else q.zeros[:, groups]
    steps = q.codes.float() - zeros if q.scheme.table is None else IQ4.values(q.codes)
    affine = q.scales.float()[:, groups] * steps
    torch.testing.assert_close(affine, q.dequantize(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_rows_and_choices_of_rows_do_not_change(kind: str) -> None:
    one, other = (rounded(random(6, 256, seed=seed), kind) for seed in (10, 11))
    assert torch.equal(one.rows(2, 5).dequantize(), one.dequantize()[2:5])
    keep = torch.tensor([[True], [False], [True], [True], [False], [False]])
    chosen = where(keep, one, other).dequantize()
    assert torch.equal(chosen, torch.where(keep, one.dequantize(), other.dequantize()))
    moved = one.to(torch.device("cpu"))
    assert torch.equal(moved.dequantize(), one.dequantize())


def test_a_block_type_has_one_grid() -> None:
    assert str(WeightScheme.of_blocks("q4_k")) == "q4_k"
    for wrong in ({"bits": 8, "block_type": "q4_k"}, {"block_type": "q4_k"}, {"block_type": "q9_z"}):
        with pytest.raises(ConfigError, match="is not the grid of a block type"):
            WeightScheme(**wrong)

"""Fake quantization of inputs, compared with the definition, one value at a time in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.errors import ConfigError
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.scheme import InputScheme
from llmq_kernels.value_tables import E4M3

int8_per_token = rounding_for(InputScheme("int8", "dynamic"))


def slow(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, K) float32"""
    rounded = np.zeros_like(x)
    for t, row in enumerate(x):
        scale = np.max(np.abs(row)) / np.float32(127.5)
        for k, value in enumerate(row):
            if scale > 0:
                code = min(127.0, max(-128.0, np.rint(value / scale)))  # rint rounds half to even
                rounded[t, k] = np.float32(code) * scale
    return rounded


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(*shape[:-1], 1, generator=generator)


def test_int8_per_token_matches_the_definition() -> None:
    x = inputs(40, 96)
    x[3] = 0  # zero everywhere
    x[4, 5] = 1e4  # a token with an outlier
    x[5, 7] = -1e4
    assert np.array_equal(int8_per_token(x).numpy(), slow(x.numpy()))


def test_a_static_scale_matches_the_definition() -> None:
    x, scale = inputs(40, 96), np.float32(0.25)
    expected = np.clip(np.rint(x.numpy() / scale), -128, 127) * scale
    assert np.array_equal(rounding_for(InputScheme("int8", "static", 0.25))(x).numpy(), expected)
    assert rounding_for(InputScheme("int8", "static", 0.25))(x.bfloat16()).dtype == torch.bfloat16


def test_halves_round_to_even_and_the_largest_code_is_127() -> None:
    x = torch.tensor([[127.5, 0.5, 1.5, 2.5, -0.5, -2.5], [-127.5, 0.5, 1.5, 2.5, -0.5, -2.5]])
    assert int8_per_token(x).tolist() == [[127, 0, 2, 2, 0, -2], [-128, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_leading_dimensions_and_the_dtype_are_kept(dtype: torch.dtype) -> None:
    x = inputs(2, 3, 5, 64).to(dtype)
    rounded = int8_per_token(x)
    assert rounded.dtype == dtype and rounded.shape == x.shape
    expected = torch.from_numpy(slow(x.float().reshape(-1, 64).numpy())).reshape(x.shape).to(dtype)
    assert torch.equal(rounded, expected)
    assert all(len(row.unique()) <= 256 for row in rounded.reshape(-1, 64))


def test_an_empty_input_is_allowed() -> None:
    assert int8_per_token(torch.empty(0, 16)).shape == (0, 16)


def test_the_gradient_passes_straight_through() -> None:
    x = inputs(7, 32).requires_grad_(True)
    weight, upstream = inputs(5, 32, seed=1), inputs(7, 5, seed=2)
    (gradient,) = torch.autograd.grad(int8_per_token(x) @ weight.T, x, upstream)
    assert torch.equal(gradient, upstream @ weight)
    assert not torch.equal(int8_per_token(x), x)


def test_fp8_per_token_takes_the_nearest_float() -> None:
    """Of all values of E4M3 times the scale of the token, which maps its largest input to 448."""
    x = inputs(40, 96)
    x[3] = 0
    rounded = rounding_for(InputScheme("fp8", "dynamic"))(x)
    scale = x.abs().amax(-1, keepdim=True) / 448
    table = E4M3.values(torch.arange(253, dtype=torch.uint8))
    nearest = ((x / scale.clamp_min(1e-38))[..., None] - table).abs().amin(-1) * scale
    assert bool((((rounded - x).abs() - nearest).abs() <= 1e-6 * x.abs()).all())
    assert float(rounded[5].abs().max()) == pytest.approx(float(x[5].abs().max()))


def test_a_static_scale_clips_fp8() -> None:
    x = torch.tensor([[1000.0, -1000.0, 0.3, 17.0]])
    assert rounding_for(InputScheme("fp8", "static", 0.5))(x).tolist() == [[224.0, -224.0, 0.3125, 16.0]]


def test_nvfp4_has_a_scale_per_16_inputs_below_a_global_one() -> None:
    """The global scale is 448 * 6 / 12, so that scales of 12 / 6 and 3 / 6 are 448 / 224 and 112 / 224."""
    x = torch.zeros(2, 32)
    x[0, :4] = torch.tensor([12.0, 2.9, -0.6, 0.4])  # in units of 2: 6, 1.45, -0.3, 0.2
    x[0, 16:19] = torch.tensor([-3.0, 0.9, 1.2])  # in units of .5: -6, 1.8, 2.4
    x[1, :2] = torch.tensor([24.0, 1e-7])  # the scale ends at 448 / 224, so that 24 is clipped
    rounded = rounding_for(InputScheme("nvfp4", "local", 448 * 6 / 12))(x)
    assert rounded[0, :4].tolist() == [12.0, 3.0, -1.0, 0.0]
    assert rounded[0, 16:19].tolist() == [-3.0, 1.0, 1.0]
    assert rounded[1, :2].tolist() == [12.0, 0.0] and not rounded[1, 2:].any()


def test_halves_of_nvfp4_round_to_even() -> None:
    """With the global scale 448, the scale of a group with the largest input 6 is 1."""
    x = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6])
    rounded = rounding_for(InputScheme("nvfp4", "local", 448.0))(x)
    assert rounded.tolist() == [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, -6]
    x[3] = float("nan")
    assert bool(rounding_for(InputScheme("nvfp4", "local", 448.0))(x).isnan().all())


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_infinities_do_not_disappear(dtype: Any, scale: float | None) -> None:
    x = torch.ones(2, 32)
    x[1, 3] = float("-inf")
    schemes = (InputScheme(dtype, "static" if scale else "dynamic", scale), InputScheme("nvfp4", "local", 448.0))
    for scheme in schemes:
        rounded = rounding_for(scheme)(x)
        assert rounded[0].isfinite().all() and not rounded[1, 3].isfinite()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_static_inputs_without_a_scale_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=f"{dtype} static .*cannot be simulated") as caught:
        rounding_for(InputScheme(dtype, "static"))
    assert "InputScheme('int8', 'dynamic')" in caught.value.hint

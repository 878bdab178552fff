"""A step of tuning: the kernel in Triton's interpreter, compared with its definition and with the path in torch."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.algorithms import fused_step, kl_tuning
from llmq.algorithms.kl_tuning import Rates
from llmq.numerics.affine_grid import fit_minmax
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq_kernels.errors import KernelInputError
from llmq_kernels.tuning_step import op, reference

RATES = Rates(rounding=0.05, scales=0.01)
BYTES = 30  # per weight: gradient 2, v, mean, square 12, code 1; v, mean, square 12, code 1, weight 2


@dataclass
class Case:
    """A weight (N, K) with its codes, and v, mean and square as after some steps; some v are beyond the codes."""

    origin: QuantizedTensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor, Tensor]

    def copy(self) -> tuple[Tensor, Tensor, Tensor]:
        v, mean, square = (part.clone() for part in self.moments)
        return v, mean, square


def make_case(
    N: int, K: int, *, group: Any = 16, bits: int = 4, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> Case:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    grid = fit_minmax(random(N, K), WeightScheme(bits=bits, group_size=group, symmetric=symmetric), torch.float16)
    origin = grid.quantized(grid.encode(random(N, K)))
    gradient = random(N, K)
    gradient[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    moments = (0.8 * random(N, K), 0.01 * random(N, K), 0.001 * random(N, K).abs())
    v, mean, square = (part.to(dtype) for part in moments)
    return Case(origin, gradient, (v, mean, square))


def kernel() -> Any:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: test_gpu_tuning_step.py")
    from llmq_kernels.tuning_step import triton_kernel

    return triton_kernel


CASES = [
    {"N": 5, "K": 48},
    {"N": 3, "K": 40, "group": "channel", "symmetric": False, "bits": 3},
    {"N": 2, "K": 2100, "group": "channel", "symmetric": False},
    {"N": 4, "K": 256, "group": 128, "bits": 8},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_kernel_does_the_step_of_its_definition(settings: dict[str, Any]) -> None:
    case, step = make_case(**settings), 3
    origin, moments = case.origin, case.copy()
    codes, weight = torch.empty_like(origin.codes), torch.empty_like(case.gradient)
    sums = torch.empty(origin.scales.shape)
    levels, (scales, zeros) = origin.scheme.levels, (origin.scales, origin.zeros)
    kernel().step(case.gradient, moments, origin.codes, scales, zeros, levels, 0.5, 0.05, step, (codes, weight), sums)
    middle = np.full(scales.shape, origin.scheme.middle, dtype=np.float64)
    arrays = (part.double().numpy() for part in (case.gradient, *case.moments, origin.codes, scales))
    *expected, expected_codes, expected_sums = reference.step(
        *arrays, middle if zeros is None else zeros.double().numpy(), levels, 0.5, 0.05, step
    )
    for part, by_definition in zip(moments, expected, strict=True):
        np.testing.assert_allclose(part.numpy(), by_definition, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums.numpy(), expected_sums, rtol=1e-4, atol=1e-3)
    ties = np.abs((origin.codes + moments[0]).numpy() % 1 - 0.5) < 1e-4
    assert ((codes.numpy() == expected_codes) | ties).all()
    after = QuantizedTensor(codes, scales, zeros, origin.scheme)
    assert torch.equal(weight, after.dequantize())
    assert (codes != origin.codes).any()


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("theta", [False, True], ids=["codes", "codes and scales"])
def test_tuning_with_the_kernel_is_tuning_in_torch(monkeypatch: pytest.MonkeyPatch, theta: bool, short: bool) -> None:
    """Ten steps of both, with the same gradients: values are equal except for rounding errors."""
    kernel()
    dtypes = kl_tuning.SHORT if short else kl_tuning.FULL
    case, rates = make_case(6, 64, symmetric=False), Rates(RATES.rounding, RATES.scales * theta)
    states = [kl_tuning.start(case.origin, None, rates, dtypes) for _ in range(2)]
    weights: list[Tensor] = []
    for fused, state in zip((True, False), states, strict=True):
        monkeypatch.setattr(op, "runs_on", lambda device, fused=fused: fused)
        assert fused_step.takes(case.origin) == fused
        for step in range(10):
            now, values = kl_tuning.advance(state, case.gradient * (step + 1), 2.0, rates, step)
        assert torch.equal(values, now.dequantize())
        weights.append(values)
    for part in ("rounding", "scales") if theta else ("rounding",):
        ours, in_torch = (getattr(state, part).value.float() for state in states)
        assert (ours - in_torch).abs().max() < (2e-2 if short else 1e-5) and ours.abs().max() > 0
    if not short:
        torch.testing.assert_close(*weights, rtol=2e-3, atol=0)


def test_a_step_moves_few_bytes() -> None:
    """All tensors that a step of block tuning reads and writes, each once."""
    case = make_case(8, 128, group=128)
    half = case.gradient.to(torch.bfloat16)
    read = (half, *case.moments, case.origin.codes)
    written = (*case.moments, case.origin.codes, half)
    assert sum(part.nbytes for part in (*read, *written)) == BYTES * 8 * 128


def test_other_grids_and_other_devices_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(4, 64)
    assert not fused_step.takes(case.origin)
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    assert fused_step.takes(case.origin)
    assert not fused_step.takes(QuantizedTensor.blank(4, 64, WeightScheme.of_blocks("iq4_nl"), torch.float16))


def test_wrong_arguments_are_refused() -> None:
    case = make_case(4, 64)
    codes = op.Codes(case.origin.codes, case.origin.scales, None, 15)
    with pytest.raises(KernelInputError, match=r"gradient: found torch.float32 \(4, 63\)"):
        op.check(codes, case.gradient[:, :63], case.moments, None, None)
    with pytest.raises(KernelInputError, match="sums"):
        op.check(codes, case.gradient, case.moments, None, torch.empty(4))
    with pytest.raises(KernelInputError, match="groups of the same width"):
        op.Codes(case.origin.codes[:, :63].contiguous(), case.origin.scales, None, 15)

"""Quantization with compensation: the reference, the torch path and the kernel, in Triton's interpreter.

All compute the same sums in different order and precision, so a code may differ where its weight is closer to the
middle between two codes than float32 resolves (`TIE` steps); and then so may all later codes of that row.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq_kernels.errors import KernelInputError
from llmq_kernels.gptq_block import op, reference, torch_path
from llmq_kernels.gptq_block.problem import Problem

# A weight of up to 2**bits steps is updated at most K times, each time rounded by 2**-24 of itself.  The roundings of K
# updates cancel like a random walk, so 300 of them come to less than 20: 20 * 256 * 2**-24 = 3e-4 steps at 8 bits.
TIE = 3e-4


@dataclass(frozen=True)
class Case:
    """E weights with a factor, a grid and a column order each; H (E, K, K) float64 in that order."""

    columns: Tensor
    upper: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    levels: int
    H: NDArray[np.float64]

    def problem(self, device: str = "cpu") -> Problem:
        """As every path takes it; the columns are a copy."""
        arrays = (self.columns.clone(), self.upper, self.scales, self.zeros, self.group_of)
        return Problem(*(array.to(device) for array in arrays), self.levels)


def make_case(
    E: int = 1, N: int = 21, K: int = 160, *, bits: int = 4, group: int | None = 32, symmetric: bool = False,
    shuffled: bool = True, seed: int = 0,
) -> Case:  # fmt: skip
    """Correlated inputs of different size, so that compensation matters; scales of both signs."""
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((E, 2 * K, K)) @ (draw.standard_normal((E, K, K)) / np.sqrt(K) + np.eye(K))
    H = X.mT @ X / (2 * K) + 0.01 * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(H)).mT
    G, levels = -(-K // (group or K)), 2**bits - 1
    orders = np.stack([draw.permutation(K) if shuffled else np.arange(K) for _ in range(E)])
    zeros = draw.integers(0, levels + 1, (E, G, N)) if not symmetric else np.full((E, G, N), (levels + 1) // 2)
    scales = draw.uniform(0.7, 1.3, (E, G, N)) * 6 / levels * draw.choice([-1, 1], (E, G, N))
    return Case(
        torch.tensor(draw.standard_normal((E, K, N)), dtype=torch.float32),
        torch.tensor(upper, dtype=torch.float32).contiguous(),
        torch.tensor(scales, dtype=torch.float32),
        torch.tensor(zeros, dtype=torch.float32),
        torch.tensor(orders // (group or K), dtype=torch.int32),
        levels,
        H,
    )


def defined(case: Case) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    arrays = (case.columns, case.upper, case.scales, case.zeros, case.group_of)
    return reference.compensate(*(array.numpy() for array in arrays), case.levels)


def by_triton(case: Case) -> Tensor:
    """Codes by the host code of the kernel, which is not called for CPU tensors otherwise."""
    codes = torch.full(case.columns.shape, 77, dtype=torch.uint8)
    kernel().quantize_columns(case.problem(), codes, 0, case.columns.shape[1])
    return codes


def kernel() -> Any:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: test_gpu_gptq.py")
    from llmq_kernels.gptq_block import triton_kernel

    return triton_kernel


def decoded(case: Case, codes: NDArray[Any]) -> NDArray[np.float64]:
    """(E, K, N) float64."""
    group = case.group_of.numpy()[:, :, None].astype(int)
    scale, zero = (np.take_along_axis(part.double().numpy(), group, 1) for part in (case.scales, case.zeros))
    return np.asarray(scale * (codes - zero))


def loss(case: Case, codes: NDArray[Any]) -> NDArray[np.float64]:
    """(E, N) under H."""
    difference = case.columns.double().numpy() - decoded(case, codes)
    return np.asarray(np.einsum("ekn,ekj,ejn->en", difference, case.H, difference))


def assert_equal_but_for_ties(case: Case, compensated: NDArray[Any]) -> None:
    """In every row, the first code that differs from the reference is at a tie, and few rows have one.

    The other rows have the same codes, hence the same loss.
    """
    codes, targets = defined(case)
    group = case.group_of.numpy()[:, :, None].astype(int)
    scale, zero = (np.take_along_axis(part.double().numpy(), group, 1) for part in (case.scales, case.zeros))
    differs = compensated != codes  # (E, K, N)
    rows = differs.any(1)
    margin = np.abs(
        targets / scale + zero - (np.maximum(compensated, codes) - 0.5)
    )  # from the middle of neighbouring codes
    first = np.take_along_axis(margin, differs.argmax(1)[:, None], 1)[:, 0]
    assert (first[rows] <= TIE).all(), f"a code differs at {first[rows].max():.1e} steps from a tie"
    assert rows.mean() <= 0.1, "too many rows near a tie for a meaningful test"
    np.testing.assert_allclose(loss(case, compensated)[~rows], loss(case, codes)[~rows])


@pytest.fixture(params=["torch", "triton"])
def compensate(request: pytest.FixtureRequest) -> Callable[[Case], Tensor]:
    return by_triton if request.param == "triton" else lambda case: op.compensate(case.problem())


# ---- the three agree


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_codes_at_every_width(compensate: Callable[[Case], Tensor], bits: int, symmetric: bool) -> None:
    case = make_case(K=40, bits=bits, symmetric=symmetric, seed=bits)
    assert_equal_but_for_ties(case, compensate(case).numpy())


@pytest.mark.parametrize("bits", [4, 6])
def test_zero_points_may_be_fractions(compensate: Callable[[Case], Tensor], bits: int) -> None:
    case = make_case(K=140, bits=bits, seed=bits)
    shifts = torch.rand(case.zeros.shape, generator=torch.Generator().manual_seed(bits)) - 0.5
    moved = replace(case, zeros=case.zeros + shifts)
    assert_equal_but_for_ties(moved, compensate(moved).numpy())


@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "natural"])
def test_codes_with_every_grouping_in_either_order(
    compensate: Callable[[Case], Tensor], group: int | None, shuffled: bool
) -> None:
    case = make_case(N=18, K=150, group=group, shuffled=shuffled)  # a block, and a partial block
    assert_equal_but_for_ties(case, compensate(case).numpy())


@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 129), (16, 128), (33, 20), (5, 300)])
def test_codes_at_awkward_shapes(compensate: Callable[[Case], Tensor], N: int, K: int) -> None:
    case = make_case(N=N, K=K, group=16)
    assert_equal_but_for_ties(case, compensate(case).numpy())


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_errors_are_left_in_the_columns_and_sum_to_the_loss(path: str) -> None:
    case = make_case(E=2, N=18, K=150)
    problem, codes = case.problem(), torch.empty(case.columns.shape, dtype=torch.uint8)
    (kernel() if path == "triton" else op).quantize_columns(problem, codes, 0, 128)
    (kernel() if path == "triton" else op).quantize_columns(problem, codes, 128, 150)
    sums = problem.columns.double().square().sum(1).numpy()
    np.testing.assert_allclose(sums, loss(case, codes.numpy()), rtol=1e-4)


def test_experts_have_separate_factors_grids_and_orders(compensate: Callable[[Case], Tensor]) -> None:
    case = make_case(E=3, N=17, K=132, seed=5)
    codes = compensate(case)
    assert_equal_but_for_ties(case, codes.numpy())
    parts = (case.columns, case.upper, case.scales, case.zeros, case.group_of)
    alone = Case(*(part[1:2] for part in parts), case.levels, case.H[1:2])
    assert torch.equal(compensate(alone)[0], codes[1])


def test_kernel_equals_torch_exactly_without_compensation() -> None:
    """No sums, so no order of sums: all codes must be equal, although every other weight is at a tie."""
    case = make_case(N=32, K=64, group=16)
    plain = replace(case, upper=torch.diag_embed(case.upper.diagonal(dim1=1, dim2=2)))
    scale, zero = (part[0][case.group_of[0].long()] for part in (case.scales, case.zeros))  # (K, N)
    code = torch.randint(-2, 17, (64, 32), generator=torch.Generator().manual_seed(0))
    plain.columns[0, ::2] = ((code + 0.5 - zero) * scale)[::2]  # which the division may or may not reproduce
    assert torch.equal(by_triton(plain), op.compensate(plain.problem()))


def one_column(values: Tensor, scales: Tensor) -> Case:
    """Weights (N,), each on a grid with its own scale, zero 0, levels 0..15."""
    return Case(
        values[None, None], torch.ones(1, 1, 1), scales[None, None], torch.zeros(1, 1, len(values)),
        torch.zeros(1, 1, dtype=torch.int32), 15, np.ones((1, 1, 1)),
    )  # fmt: skip


def test_ties_go_to_the_even_code(compensate: Callable[[Case], Tensor]) -> None:
    values = torch.tensor([-3.0, -0.5, 0.5, 1.5, 2.5, 3.5, 13.5, 14.5, 15.5, 1e9, 2.4999998, 2.5000002])
    codes = compensate(one_column(values, torch.ones(len(values))))
    assert codes.flatten().tolist() == [0, 0, 0, 2, 2, 4, 14, 14, 15, 15, 2, 3]


def test_division_by_the_scale_is_correctly_rounded(compensate: Callable[[Case], Tensor]) -> None:
    """1.5 scales divided by the scale is a tie or just off it; multiplying by 1 / scale gives other sides."""
    scales = torch.linspace(0.5, 1.7, 500)
    quotient = (scales * 1.5).double() / scales.double()
    expected = torch.round(quotient.float())  # rounded once from float64: the correctly rounded quotient
    assert 0 < int((expected == 1).sum()) < 500
    assert torch.equal(compensate(one_column(scales * 1.5, scales)).flatten().float(), expected)


# ---- blocks


def test_range_updates_later_columns_only(compensate: Callable[[Case], Tensor]) -> None:
    case = make_case(N=16, K=96)
    path = kernel() if compensate is by_triton else torch_path
    problem = case.problem()
    codes = torch.full(case.columns.shape, 77, dtype=torch.uint8)
    for start, stop in ((0, 32), (32, 96)):
        assert bool((codes[:, start:] == 77).all())
        path.quantize_columns(problem, codes, start, stop)
    assert_equal_but_for_ties(case, codes.numpy())


def test_columns_and_factor_may_have_any_strides(compensate: Callable[[Case], Tensor]) -> None:
    case = make_case(N=16, K=140)
    strided = replace(case, columns=case.columns.mT.contiguous().mT, upper=case.upper.mT.contiguous().mT)
    assert_equal_but_for_ties(case, compensate(strided).numpy())


def test_factor_below_the_diagonal_is_not_read(compensate: Callable[[Case], Tensor]) -> None:
    case = make_case(N=16, K=130)
    codes = compensate(case)
    below = torch.ones_like(case.upper).tril(-1).bool()
    case.upper[below] = float("nan")
    assert torch.equal(compensate(case), codes)


def test_empty_weights_are_accepted() -> None:
    for N, K in ((0, 8), (4, 0)):
        shape = (1, K, N)
        group_of = torch.zeros(1, K, dtype=torch.int32)
        problem = Problem(
            torch.zeros(shape), torch.zeros(1, K, K), torch.ones(1, 1, N), torch.zeros(1, 1, N), group_of, 15
        )
        assert op.compensate(problem).shape == shape


# ---- what is refused

WRONG = {
    "columns are": {"columns": torch.zeros(4, 4)},
    "columns: found torch.float64": {"columns": torch.zeros(1, 160, 21, dtype=torch.float64)},
    "upper: found": {"upper": torch.zeros(1, 160, 159)},
    "zeros: found": {"zeros": torch.zeros(1, 5, 21, dtype=torch.int16)},
    "group_of: found torch.int64": {"group_of": torch.zeros(1, 160, dtype=torch.int64)},
    "scales: found strides": {"scales": torch.ones(1, 21, 5).mT},
    "scales: found on meta": {"scales": torch.ones(1, 5, 21, device="meta")},
    "levels is 256": {"levels": 256},
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_problem_is_refused(message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        replace(make_case().problem(), **WRONG[message])


def test_range_beyond_the_columns_is_refused() -> None:
    case = make_case()
    codes = torch.empty(case.columns.shape, dtype=torch.uint8)
    with pytest.raises(KernelInputError, match="columns 128 to 256 of 160"):
        op.quantize_columns(case.problem(), codes, 128, 256)


def test_codes_of_another_shape_are_refused() -> None:
    case = make_case()
    with pytest.raises(KernelInputError, match="codes: found"):
        op.quantize_columns(case.problem(), torch.empty(1, 160, 20, dtype=torch.uint8), 0, 128)

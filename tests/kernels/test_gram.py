"""XᵀX: the definition, the torch paths, and the kernel in Triton's interpreter (float16: bfloat16 is wrong there)."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq_kernels.errors import KernelInputError
from llmq_kernels.gram import op, reference

SHAPES = [(1, 1), (3, 5), (70, 129), (33, 128), (64, 200)]


def inputs(T: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(T, K, generator=torch.Generator().manual_seed(T)) + 0.5).to(dtype)


def poisoned(K: int, upper_only: bool) -> Tensor:
    """A nonzero sum to add to; with `upper_only`, the values below the diagonal are NaN and must have no effect."""
    start = torch.arange(K * K, dtype=torch.float32).view(K, K) / K
    start = start + start.T
    if upper_only:
        start[torch.ones(K, K).tril(-1).bool()] = float("nan")
    return start


def assert_adds_up(update: Any, x: Tensor, upper_only: bool) -> None:
    """A float32 sum of T products in any order is off by at most T + 1 roundings of the sum of their magnitudes."""
    T, K = x.shape
    gram = poisoned(K, upper_only)
    update(gram, x, upper_only=upper_only)
    if upper_only:
        op.mirror(gram)
        assert torch.equal(gram, gram.T)
    before, X = poisoned(K, False).double().numpy(), x.double().numpy()
    expected = before + reference.second_moment(X)
    bound = (T + 1) * 2.0**-23 * (before + reference.second_moment(np.abs(X)))
    assert (np.abs(gram.double().numpy() - expected) <= bound).all()


def by_triton(gram: Tensor, x: Tensor, *, upper_only: bool) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: test_gpu_gptq.py")
    from llmq_kernels.gram import triton_kernel

    triton_kernel.update(gram, x, upper_only=upper_only)


@pytest.mark.parametrize("upper_only", [True, False], ids=["upper", "full"])
@pytest.mark.parametrize(("T", "K"), SHAPES)
def test_kernel_sums_the_second_moment(T: int, K: int, upper_only: bool) -> None:
    assert_adds_up(by_triton, inputs(T, K, torch.float16), upper_only)


@pytest.mark.parametrize("upper_only", [True, False], ids=["upper", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "K"), SHAPES)
def test_torch_path_sums_the_second_moment(
    T: int, K: int, dtype: torch.dtype, upper_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "STRIP", 48)
    assert_adds_up(op.update, inputs(T, K, dtype), upper_only)


def test_tiles_below_the_diagonal_are_not_written() -> None:
    gram = torch.full((300, 300), 7.0)
    by_triton(gram, inputs(8, 300, torch.float16), upper_only=True)
    assert bool((gram[128:, :128] == 7).all() and (gram[256:, :256] == 7).all())
    assert not bool((gram[:128, 128:] == 7).any())


def test_every_tile_is_computed_once() -> None:
    """More rows of tiles than are visited together, and a partial last group."""
    from llmq_kernels.gram import triton_kernel

    K = triton_kernel.TILE * (triton_kernel.TILE_ROWS_TOGETHER + 2) + 1
    x = inputs(1, K, torch.float16)
    gram = torch.zeros(K, K)
    by_triton(gram, x, upper_only=True)
    op.mirror(gram)
    assert torch.equal(gram, x.T.float() @ x.float())  # one exact product each


def test_inputs_may_be_strided_or_transposed() -> None:
    x = inputs(40, 150, torch.float16)
    expected, wide, turned = torch.zeros(150, 150), torch.zeros(150, 150), torch.zeros(150, 150)
    by_triton(expected, x, upper_only=False)
    by_triton(wide, torch.cat([x, x], dim=1)[:, :150], upper_only=False)
    by_triton(turned, x.T.contiguous().T, upper_only=False)
    assert torch.equal(wide, expected) and torch.equal(turned, expected)


@pytest.mark.parametrize("strip", [1, 7, 50, 64])
def test_mirroring_copies_the_upper_triangle(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "STRIP", strip)
    gram = inputs(50, 50)
    upper = gram.triu()
    op.mirror(gram)
    assert torch.equal(gram, upper + upper.triu(1).T)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Half precision is multiplied as on CUDA: exact products, sums in float32.  The dtypes of operands are listed."""
    multiplied: list[torch.dtype] = []

    def product(left: Tensor, right: Tensor) -> Tensor:
        multiplied.extend((left.dtype, right.dtype))
        return left.float() @ right.float()

    monkeypatch.setattr(op, "half_product", product)
    monkeypatch.setattr(op, "multiplied_in", lambda dtype, on_cuda: dtype)
    return multiplied


def test_half_precision_stays_as_it_is_on_cuda_only() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert op.multiplied_in(dtype, on_cuda=True) == dtype
        assert op.multiplied_in(dtype, on_cuda=False) == torch.float32
    assert op.multiplied_in(torch.float32, on_cuda=True) == torch.float32


def gammas(T: int) -> Tensor:
    return torch.rand(T, generator=torch.Generator().manual_seed(7)) * 40 + 0.5


@pytest.mark.parametrize("upper_only", [True, False], ids=["upper", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_cuda", [True, False], ids=["cuda", "cpu"])
def test_rows_count_by_their_weights(
    dtype: torch.dtype, upper_only: bool, on_cuda: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """An operand in half precision that is weighted has one more rounding error, and no product is in float32."""
    multiplied = request.getfixturevalue("as_on_cuda") if on_cuda else []
    monkeypatch.setattr(op, "STRIP", 48)
    T, K = 64, 130
    x, weights = inputs(T, K, dtype), gammas(T)
    gram = poisoned(K, upper_only)
    op.update(gram, x, weights, upper_only=upper_only)
    if upper_only:
        op.mirror(gram)
    assert torch.equal(gram, gram.T)
    X, gamma = x.double().numpy(), weights.double().numpy()
    before = poisoned(K, False).double().numpy()
    halves = on_cuda and dtype != torch.float32
    unit = torch.finfo(dtype).eps / 2 if halves else 2.0**-22
    bound = (unit + (T + 1) * 2.0**-23) * (before + (np.abs(X).T * gamma) @ np.abs(X))
    assert (np.abs(gram.double().numpy() - before - (X.T * gamma) @ X) <= bound).all()
    assert set(multiplied) == ({dtype} if halves else set())


@pytest.mark.usefixtures("as_on_cuda")
def test_weighted_inputs_in_float16_do_not_overflow() -> None:
    x = torch.full((3, 16), 200.0, dtype=torch.float16)
    gram = torch.zeros(16, 16)
    op.update(gram, x, torch.tensor([1000.0, 1.0, 0.0]), upper_only=True)
    torch.testing.assert_close(gram, torch.full((16, 16), 1001 * 200.0**2), rtol=1e-3, atol=0)
    op.update(gram, x, torch.zeros(3), upper_only=True)
    assert bool(torch.isfinite(gram).all())


def test_second_moment_needs_no_second_array(largest_tensor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "STRIP", 64)
    gram, x = torch.zeros(256, 256), torch.zeros(1, 256)
    with largest_tensor:
        op.update(gram, x, upper_only=True)
        op.mirror(gram)
    assert largest_tensor.bytes < gram.nbytes  # the largest tensors are views of the sum


WRONG = {
    "x is torch.float64": (torch.zeros(2, 2), torch.zeros(4, 2, dtype=torch.float64)),
    r"x is torch.float32 \(2,\)": (torch.zeros(2, 2), torch.zeros(2)),
    r"expected torch.float32 \(2, 2\)": (torch.zeros(3, 2), torch.zeros(4, 2)),
    "gram: found torch.float64": (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(4, 2)),
    "gram: found on meta": (torch.zeros(2, 2, device="meta"), torch.zeros(4, 2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_inputs_are_refused(message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        op.update(*WRONG[message], upper_only=True)


def test_zero_tokens_add_nothing() -> None:
    gram = torch.ones(3, 3)
    op.update(gram, torch.empty(0, 3), upper_only=False)
    assert torch.equal(gram, torch.ones(3, 3))
